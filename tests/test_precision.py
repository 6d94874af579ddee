"""bf16 compute with fp32 master weights: small steps arrive, and on a GPU it is the default."""

import json

import pytest
import torch
from helpers import make_rows, write_jsonl
from runs import fit, weights

from sdpo_lightning import CachedReference, PreferenceSource, ResidentReference
from sdpo_lightning.cli import CurriculumCLI, main

LR = 5e-7


def _adamw(params):
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = write_jsonl(tmp_path_factory.mktemp("data") / "a.jsonl", make_rows(40, 0, "a"))
    return PreferenceSource("a", str(path))


def _moved(run_dir, model_dir, source, precision: str, reference) -> dict[str, torch.Tensor]:
    arguments = {"optimizer": _adamw, "warmup_ratio": 0.0, "lr_scheduler": "constant"}
    fit(run_dir, model_dir, [source], reference=reference, module_args=arguments, trainer_args={"precision": precision})
    before, after = weights(model_dir), weights(run_dir / "stages" / "01-a")
    return {name: after[name] - before[name] for name in before}


@pytest.mark.parametrize("reference", [ResidentReference, CachedReference])
def test_at_5e_7_weights_move_as_in_fp32_within_10_percent(tmp_path, tiny_model_dir, source, reference):
    fp32, mixed = (
        _moved(tmp_path / precision, tiny_model_dir, source, precision, reference())
        for precision in ("32-true", "bf16-mixed")
    )
    # 20 steps of at most lr each.
    ours, theirs = (torch.cat([moved[name].flatten() for name in fp32]) for moved in (mixed, fp32))
    assert 2 * LR < theirs.abs().max() <= 20 * LR * 1.01
    assert ours.norm() / theirs.norm() == pytest.approx(1.0, abs=0.1)
    assert (ours - theirs).norm() / theirs.norm() < 0.1
    # The control: of the same steps, weights stored in bf16 would have kept almost nothing.
    start = torch.cat([tensor.flatten() for _, tensor in sorted(weights(tiny_model_dir).items())])
    step = torch.cat([fp32[name].flatten() for name in sorted(fp32)])
    kept = (start.bfloat16() + step.bfloat16()).float() - start.bfloat16().float()
    assert (kept == 0).float().mean() > 0.9


class NeverInstantiates(CurriculumCLI):
    """Stops once the configuration is final."""

    def instantiate_classes(self):
        raise SystemExit(self.config.fit.trainer.precision)


@pytest.mark.parametrize(
    "accelerator, cuda, bf16, given, expected",
    [
        ("auto", True, True, None, "bf16-mixed"),
        ("gpu", True, True, None, "bf16-mixed"),
        ("gpu", True, True, "32-true", "32-true"),
        ("gpu", True, False, None, None),
        ("cpu", True, True, None, None),
        ("auto", False, False, None, None),
    ],
)
def test_a_gpu_computes_in_bf16_by_default(tmp_path, monkeypatch, accelerator, cuda, bf16, given, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    words = ["fit", f"--trainer.default_root_dir={tmp_path}", f"--trainer.accelerator={accelerator}"]
    words += ["--model.model_name_or_path=m", f"--data.sources={json.dumps([{'name': 'a', 'path': 'a.jsonl'}])}"]
    words += [f"--trainer.precision={given}"] if given else []
    with pytest.raises(SystemExit) as stop:
        NeverInstantiates(args=words)
    assert stop.value.code == expected


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precisions_that_cannot_learn_are_refused_with_the_way_out(tmp_path, tiny_model_dir, capsys, precision):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(9, 0, "a"))
    words = ["fit", f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu"]
    words += [f"--model.model_name_or_path={tiny_model_dir}", f"--trainer.precision={precision}"]
    words += [f"--data.sources={json.dumps([{'name': 'a', 'path': str(path)}])}"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert precision in line and "bf16-mixed computes in bf16 and keeps fp32 master weights" in line
