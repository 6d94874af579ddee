"""Tensors that leave their device and come back: bits, identity, freed storages, exceptions; and a run around it."""

import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from helpers import make_rows, write_jsonl
from made_script import FromFolder, sampled, train
from runs import losses, weights
from torch import nn

from sdpo_lightning import (
    AdapterReference,
    LoraSettings,
    ResidentReference,
    StageCheckpoint,
    VLLMPairGenerator,
    generation_vllm,
)
from sdpo_lightning.data import model_before
from sdpo_lightning.generation import Sampling
from sdpo_lightning.generation_vllm import VLLMGenerator, VLLMSettings
from sdpo_lightning.parking import parked
from sdpo_lightning.trainer_memory import memory_released
from sdpo_lightning.types import ConfigurationError

STAND_IN = Path(__file__).resolve().parent / "vllm_stand_in"
CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Tied(nn.Module):
    """Embedding and head are one weight; a buffer is a view of another."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(12.0))
        self.register_buffer("part", self.table[4:8])

    def forward(self, ids):
        """Logits."""
        return self.head(torch.tanh(self.middle(self.embedding(ids))))


def stepped(pause, device: torch.device = CPU, width: int = 8) -> list[torch.Tensor]:
    """Weights and states after four steps, with `pause` between the second and the third."""
    torch.manual_seed(3)
    model = Tied(width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ids = torch.arange(11, device=device)
    for step in range(4):
        if step == 2:
            pause(model, optimizer)
        nn.functional.cross_entropy(model(ids), (ids + 3) % 11).backward()
        optimizer.step()
        optimizer.zero_grad()
    states = [v for state in optimizer.state.values() for v in state.values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers(), *states]]


def test_steps_around_a_pause_have_the_same_bits_and_ties_hold():
    def pause(model, optimizer):
        names = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        with memory_released([model], [optimizer], CPU):
            # Views keep their shape; there is nothing behind it.
            assert all(t.untyped_storage().nbytes() == 0 for t in [*model.parameters(), *model.buffers()])
            states = [v for state in optimizer.state.values() for v in state.values()]
            assert states and all(value.untyped_storage().nbytes() == 0 for value in states)
        assert names == {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        assert model.head.weight is model.embedding.weight
        # A view of the buffer sees what is written into it.
        model.table[5] += 1
        assert model.part.tolist() == [4.0, 6.0, 6.0, 7.0]
        model.table[5] -= 1

    plain = stepped(lambda model, optimizer: None)
    assert all(map(torch.equal, stepped(pause), plain))


def test_the_bytes_are_counted_once_and_come_back_after_an_exception():
    base = torch.arange(10.0)
    tensors = [base, base[2:5], torch.ones(3, dtype=torch.bfloat16), torch.empty(0), torch.empty(4, device="meta")]
    before = [tensor.clone() for tensor in tensors[:3]]
    with pytest.raises(ZeroDivisionError), parked(tensors, CPU) as size:
        # Ten floats and three halves.
        assert size == 40 + 6
        raise ZeroDivisionError
    assert all(map(torch.equal, tensors[:3], before))
    base[3] = 7.0
    assert tensors[1].tolist() == [2.0, 7.0, 4.0]


def test_a_storage_that_belongs_to_a_file_is_let_go_of(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(torch.arange(6.0).numpy().tobytes())
    mapped = torch.from_file(str(path), size=6, dtype=torch.float32)
    storage = mapped.untyped_storage()
    assert not storage.resizable()
    whole, half = nn.Parameter(mapped.view(2, 3)), nn.Parameter(mapped[3:])
    gone = weakref.ref(mapped)
    del mapped, storage
    with parked([whole, half], CPU) as size:
        assert size == 24 and whole.untyped_storage().nbytes() == half.untyped_storage().nbytes() == 0
    assert gone() is None and whole.tolist() == [[0, 1, 2], [3, 4, 5]]
    whole.data[1, 0] = 9.0
    assert half.tolist() == [9.0, 4.0, 5.0]


@gpu
def test_the_memory_of_a_gpu_is_free_meanwhile():
    device = torch.device("cuda", 0)

    def pause(model, optimizer):
        held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        with memory_released([model], [optimizer], device):
            assert torch.cuda.memory_allocated() < 0.05 * held and torch.cuda.memory_reserved() < 0.2 * reserved
        assert torch.cuda.memory_allocated() >= 0.95 * held

    plain = stepped(lambda model, optimizer: None, device, 2048)
    assert all(map(torch.equal, stepped(pause, device, 2048), plain))


# ---- in a run


@pytest.fixture
def out(tmp_path) -> Path:
    """Data and prompts."""
    write_jsonl(tmp_path / "a.jsonl", make_rows(6, 0))
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"w{n} w{n + 7} w{n + 3}"} for n in range(24)])
    return tmp_path


@pytest.fixture
def stand_in(monkeypatch, tmp_path) -> Path:
    """vLLM's place is taken; returns the file in which it notes each start."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), *sys.path]))
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "starts"))
    return tmp_path / "starts"


@pytest.mark.parametrize("kind", ["resident", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_around_vllm_has_the_bits_of_one_by_the_policy(kind, out, stand_in, ending_model_dir, monkeypatch):
    held = []

    class Watched(VLLMPairGenerator):
        """Looks at what the trainer holds while a process answers."""

        def open(self, folder, devices):
            held.append([t.untyped_storage().nbytes() for t in kept()])
            return super().open(folder, devices)

    tensors: list[torch.Tensor] = []
    released = model_before.memory_released

    def noted(models, optimizers, device):
        tensors[:] = [p for model in models for p in model.parameters()]
        tensors.extend(v for o in optimizers for state in o.state.values() for v in state.values())
        return released(models, optimizers, device)

    def kept():
        return tensors

    monkeypatch.setattr(model_before, "memory_released", noted)
    references = {"resident": ResidentReference, "lora": AdapterReference}
    module = {"lora": LoraSettings(r=4)} if kind == "lora" else {}
    for run, given in (("live", {}), ("vllm", {"pair_generator": Watched(python=sys.executable)})):
        given |= {"module_args": module, "reference": references[kind]()}
        train(out, str(ending_model_dir), out / run, None, [sampled(out)], **given)
    rows = [(out / run / "new_pairs" / "02-new.jsonl").read_bytes() for run in ("live", "vllm")]
    assert losses(out / "live")[:3] == losses(out / "vllm")[:3]
    [sizes] = held
    assert len(sizes) > 10 and set(sizes) == {0}
    # One load, whatever the number of requests.
    assert len(stand_in.read_text().splitlines()) == 1
    if kind == "resident":
        # Merged adapters are other numbers in the last digits, and may draw other words.
        assert rows[0] == rows[1] and losses(out / "live") == losses(out / "vllm")
        left, right = (weights(out / run / "stages" / "02-new") for run in ("live", "vllm"))
        assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.slow
def test_a_process_that_fails_and_other_settings_make_rows_anew(out, stand_in, ending_model_dir, monkeypatch):
    def go(utilization=0.9, **given):
        chosen = VLLMPairGenerator(python=sys.executable, gpu_memory_utilization=utilization)
        given |= {"pair_generator": chosen, "callbacks": [StageCheckpoint(every_n_train_steps=1, save_top_k=-1)]}
        return train(out, str(ending_model_dir), out / "run", None, [sampled(out)], **given)

    monkeypatch.setenv("STAND_IN_FAILS", "1")
    with pytest.raises(OSError, match="CUDA out of memory"):
        go()
    assert not list((out / "run" / "new_pairs").iterdir())
    monkeypatch.delenv("STAND_IN_FAILS")
    # The end of stage 1.
    [checkpoint] = (out / "run" / "checkpoints").glob("*step=3.ckpt")
    for utilization, starts in ((0.9, 2), (0.9, 2), (0.5, 3)):
        go(utilization, ckpt_path=checkpoint)
        assert len(stand_in.read_text().splitlines()) == starts
    assert (out / "run" / "stale" / "02-new.jsonl").exists()


def test_generators_that_cannot_be_used_are_refused_at_once(out, ending_model_dir, monkeypatch):
    with pytest.raises(ConfigurationError, match="vLLM isn't installed"):
        chosen = VLLMPairGenerator(python=sys.executable)
        train(out, str(ending_model_dir), out / "run", None, [sampled(out)], pair_generator=chosen)
    with pytest.raises(ConfigurationError, match="without `data.pair_sources`"):
        train(out, str(ending_model_dir), out / "run", None, [], pair_generator=FromFolder())
    with pytest.raises(ConfigurationError, match=r"`data.pair_generator` with `model.quantization`"):
        module = {"lora": LoraSettings(r=4), "quantization": "nf4"}
        arguments = {"module_args": module, "reference": AdapterReference(), "pair_generator": FromFolder()}
        train(out, str(ending_model_dir), out / "run", None, [sampled(out)], **arguments)


@pytest.mark.slow
def test_a_process_stays_for_a_with_and_sees_the_cards_of_the_run(stand_in, ending_model_dir, monkeypatch):
    settings = VLLMSettings(python=sys.executable)
    with VLLMGenerator(ending_model_dir, settings) as generator:
        first = [generator.generate(["w1 w2"], Sampling(4, 1.0, answers=2, seed=seed)) for seed in (5, 5, 6)]
        assert len(stand_in.read_text().splitlines()) == 1
    assert first[0] == first[1] and generator.generate(["w1 w2"], Sampling(4, 1.0, answers=2, seed=5)) == first[0]
    assert len(stand_in.read_text().splitlines()) == 2
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    assert not {"RANK", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & generation_vllm._environment(()).keys()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert generation_vllm._environment((0, 2))["CUDA_VISIBLE_DEVICES"] == "4,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert generation_vllm._environment((1,))["CUDA_VISIBLE_DEVICES"] == "1"


ASKS = """
import sys
from sdpo_lightning.generation import Sampling
from sdpo_lightning.generation_vllm import VLLMGenerator, VLLMSettings
with VLLMGenerator(sys.argv[1], VLLMSettings(python=sys.executable)) as generator:
    generator.generate(["w1"], Sampling(2))
    print(generator._process._process.pid, flush=True)
    input()
"""


@pytest.mark.slow
def test_nothing_stays_behind_a_process_that_was_killed(stand_in, ending_model_dir):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    asking = subprocess.Popen([sys.executable, "-c", ASKS, str(ending_model_dir)], **pipes)
    worker = int(asking.stdout.readline())
    os.kill(worker, 0)
    asking.send_signal(signal.SIGKILL)
    asking.wait()
    for _ in range(100):
        # A process that has ended may wait for somebody to ask how.
        status = Path(f"/proc/{worker}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the worker lives on")
