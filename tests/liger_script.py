"""Liger's kernels against the model's own code, without a GPU: `liger_script.py MODEL`.

Triton's interpreter runs the kernels on a CPU; TRITON_INTERPRET=1 has to be set before Triton is imported. What it does
otherwise than the compiler is mended here: a float argument is an fp32 scalar, and `rsqrt` is no function of libdevice.
Prints the largest differences, and the modules whose kernels ran, as JSON.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from test_execution import PAIRS, gradients
from triton.runtime import interpreter

from sdpo_lightning.backbone import load_policy
from sdpo_lightning.data.collate import SharedPrefixCollator
from sdpo_lightning.execution import Execution

RAN: set[str] = set()


def count_and_mend() -> None:
    """Note each kernel that is run, and do what the interpreter leaves out."""
    run, convert = interpreter.GridExecutor.__call__, interpreter._implicit_cvt

    def noted(self, *args, **kwargs):
        RAN.add(self.fn.__module__)
        return run(self, *args, **kwargs)

    def converted(arg):
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
        return convert(arg)

    interpreter.GridExecutor.__call__ = noted
    interpreter._implicit_cvt = converted
    # By its name: the interpreter replaces what `tl.math` holds while a kernel runs.
    rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)


@torch.no_grad()
def reference_logps(model_dir: str) -> list[torch.Tensor]:
    """Logps of a frozen copy, made before the policy changes and asked before and after that; then the policy's own."""
    policy = Execution(liger=True).apply(load_policy(model_dir))
    reference = policy.frozen_copy()
    batch = SharedPrefixCollator(0)([0, 1], PAIRS, [1.0, 1.0], 2)
    before = reference(batch)
    for parameter in policy.parameters():
        parameter.mul_(1.5)
    return [before, reference(batch), policy(batch)]


def main(model_dir: str) -> None:
    """The model's own code first: Liger replaces the rotary embedding for the whole process."""
    torch.set_num_threads(1)
    logps, expected = gradients(model_dir, Execution())
    assert not RAN
    count_and_mend()
    torch.cuda.is_available = lambda: True
    found = {}
    for name, recomputed in (("kept", False), ("recomputed", True)):
        again, grads = gradients(model_dir, Execution(liger=True, gradient_checkpointing=recomputed))
        assert grads.keys() == expected.keys()
        found[name] = {
            "logps": (again - logps).abs().max().item(),
            "gradients": max((grads[n] - expected[n]).abs().max().item() for n in expected),
        }
    before, after, policys = reference_logps(model_dir)
    reference = {
        "logps": (before - logps).abs().max().item(),
        "moved": (after - before).abs().max().item(),
        "policy_moved": (policys - before).abs().max().item(),
    }
    largest = max(grad.abs().max().item() for grad in expected.values())
    print(json.dumps({"found": found, "reference": reference, "largest": largest, "ran": sorted(RAN)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
