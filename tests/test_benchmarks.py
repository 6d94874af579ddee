"""The benchmarks' arithmetic, and that their code runs. Nothing is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_variants, scaling, scaling_report
from benchmarks.flops import Flops, Shape, executed_forward, floor_forward, left_out, peak_flops, training_flops
from benchmarks.gpu_jobs import SETTINGS, Job
from benchmarks.workloads import long_pairs, pair_ids, pair_lengths, pair_rows, without_prompts

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Shape(hidden=4, layers=2, heads=2, kv_heads=1, intermediate=6, vocab=10)
# A layer: q and o 4x4, k and v 4x2, the MLP three times 4x6.
LAYER = 2 * 16 + 2 * 8 + 3 * 24
PAIR = (3, 2, 1)
JOB = Job("tiny", "cpu", length=48, pairs=4, step_pairs=2, micro_batch=1)


def run(*words: str) -> subprocess.CompletedProcess:
    """A Python process in the repository's root."""
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


# ---- FLOPs


def test_the_floor_of_a_pair_by_hand():
    assert SHAPE.layer_weights == LAYER == 120
    # Embedding 10x4, two norms of 4 a layer, the last norm.
    assert SHAPE.parameters == 40 + 2 * (120 + 8) + 4
    assert replace(SHAPE, tied=False).parameters == SHAPE.parameters + 40
    flops = floor_forward(SHAPE, [PAIR])
    # 6 tokens. Scores: prompt and chosen 1+2+3+4+5; the rejected token sees 3 + itself. 3 answer tokens.
    assert flops == Flops(body=2 * 2 * 120 * 6, attention=4 * 2 * 4 * (15 + 4), head=2 * 10 * 4 * 3)
    assert floor_forward(SHAPE, [PAIR, PAIR]).total == 2 * flops.total


def test_what_layouts_execute_by_hand():
    def attention(scores: int) -> int:
        return 4 * 2 * 4 * scores

    shared = executed_forward(SHAPE, [PAIR], "shared_prefix", 1)
    assert (shared.body, shared.attention) == (2 * 2 * 120 * 6, attention(15 + 4))
    # Two rejected tokens: the kernel that is given a mask computes 2 x 5, of which one is masked.
    assert executed_forward(SHAPE, [(3, 2, 2)], "shared_prefix", 1).attention == attention(15 + 10)
    packed = executed_forward(SHAPE, [PAIR], "packed", 1)
    assert (packed.body, packed.attention) == (2 * 2 * 120 * 9, attention(15 + 10))
    # Rows of 5, one of them padded, so all 25 scores; equal rows need no mask.
    padded = executed_forward(SHAPE, [PAIR], "padded", 1)
    assert (padded.body, padded.attention) == (2 * 2 * 120 * 10, attention(50))
    assert executed_forward(SHAPE, [(3, 2, 2)], "padded", 1).attention == attention(30)
    # A longer pair in the same micro-batch pads the shorter one.
    assert executed_forward(SHAPE, [PAIR, (3, 5, 5)], "padded", 2).body == 2 * 2 * 120 * 4 * 8
    assert executed_forward(SHAPE, [PAIR, (3, 5, 5)], "padded", 1).body == 2 * 2 * 120 * (2 * 5 + 2 * 8)
    assert shared.head == packed.head == padded.head == 240


def test_what_is_left_out_by_hand():
    """3 of 6 tokens are sources; packed 3 of 9. Queries and outputs 2 x 16 weights, and the MLP's."""
    weights = 2 * 16 + 3 * 4 * SHAPE.intermediate
    assert left_out(SHAPE, [PAIR], "shared_prefix", 1) == 2 * weights * 3
    assert left_out(SHAPE, [PAIR], "packed", 1) == 2 * weights * 6
    # 70 sources are 128 positions, of 50 + 70 tokens and of 100 + 70.
    assert left_out(SHAPE, [(50, 40, 30)], "shared_prefix", 1) == 0
    assert left_out(SHAPE, [(50, 40, 30)], "packed", 1) == 2 * weights * 42


def test_training_counts_its_forwards():
    forward = Flops(body=100, attention=10, head=1)
    # Forward, twice that backward, one reference pass.
    assert training_flops(forward) == 444
    assert training_flops(forward, reference=0) == 333
    assert training_flops(forward, checkpointing=True) == 444 + 110
    assert training_flops(forward, head_again=True) == 445
    # Frozen weights get no gradient; attention has none.
    assert training_flops(forward, frozen=True) == 300 + 40 + 3


@pytest.mark.parametrize(("variant", "layout"), [("ours", "shared_prefix"), ("packed", "packed")])
def test_matrix_products_that_run_are_those_of_the_arithmetic(variant, layout):
    from torch.utils.flop_counter import FlopCounterMode

    job = replace(JOB, variant=variant)
    loop = gpu_variants.BareLoop(job)
    ids = pair_ids(job.timed_pairs, 512)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for batch in loop.batches(ids):
            loop.score(batch)
    forward = executed_forward(SETTINGS["tiny"].shape, job.timed_pairs, layout, 1)
    least = forward.body - left_out(SETTINGS["tiny"].shape, job.timed_pairs, layout, 1)
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == least + forward.head < forward.body + forward.head


def test_peaks_go_by_name():
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "cpu")
    assert [peak_flops(name) for name in names] == [989e12, 989e12, 312e12, 756e12, None]


# ---- workloads


def test_lengths_are_seeded_cut_and_scaled():
    pairs = pair_lengths(200, 1024, seed=3)
    assert pairs == pair_lengths(200, 1024, seed=3) != pair_lengths(200, 1024, seed=4)
    assert all(min(pair) >= 1 and pair[0] <= 512 and pair[0] + max(pair[1:]) <= 1024 for pair in pairs)
    prompts, chosen, _ = (sorted(side) for side in zip(*pairs, strict=True))
    assert 90 < prompts[100] < 160 and 210 < chosen[100] < 310
    doubled = pair_lengths(200, 1024, scale=2.0, seed=3)
    assert sum(map(sum, doubled)) == pytest.approx(2 * sum(map(sum, pairs)), rel=0.01)
    assert without_prompts([(7, 3, 2)]) == [(1, 3, 2)]
    assert long_pairs(2, 9) == [(4, 5, 5)] * 2


def test_ids_have_the_lengths_and_no_special_token():
    ids = pair_ids([(3, 2, 1), (1, 1, 1)], vocab=4)
    assert [tuple(map(len, row)) for row in ids] == [(3, 2, 1), (1, 1, 1)]
    assert {i for row in ids for side in row for i in side} <= {2, 3}
    assert all(chosen[0] != rejected[0] for _, chosen, rejected in ids)
    assert pair_rows([([2, 3], [2], [3])]) == [{"prompt": "t2 t3", "chosen": " t2", "rejected": " t3"}]


# ---- scaling


def test_a_point_counts_its_own_pairs():
    point = scaling.Point("length", 1, vocab=100, pairs=2, repeats=3)
    pairs = pair_lengths(2, scaling.MAX_LENGTH, scaling.SCALE)
    tokens, answers = sum(map(sum, pairs)), sum(c + r for _, c, r in pairs)
    forward = floor_forward(point.shape, pairs)
    assert forward.body == 2 * 4 * point.shape.layer_weights * tokens
    assert forward.head == 2 * 100 * 256 * answers
    assert point.flops == 4 * forward.total
    assert replace(point, axis="pairs", value=7).work == point.work != replace(point, vocab=99).work


def test_an_axis_report_by_hand():
    points = [scaling.Point("vocabulary", v, vocab=v, pairs=1) for v in (100, 200)]
    work = [point.flops for point in points]
    runs = [
        [{"seconds": 1.0, "peak_mb": 10.0}, {"seconds": 2.0, "peak_mb": 10.0}],
        [{"seconds": 1.2 * work[1] / work[0], "peak_mb": 15.0}, {"seconds": 2.8 * work[1] / work[0], "peak_mb": 15.0}],
    ]
    found = scaling.axis_report(points, runs)
    # 1.2 in the first round, 2.8 / 2 in the second.
    assert found["points"][1]["time_per_flop"] == pytest.approx([1.3, 1.2, 1.4])
    assert found["worst_time_per_flop"] == pytest.approx(1.3) and not found["within_10_percent"]
    # 1.5 times the memory at twice the vocabulary.
    assert found["points"][1]["memory_per_line"][0] == pytest.approx(0.75)
    assert found["peak_mb_last_to_first"] == pytest.approx(1.5)
    level = scaling.axis_report([replace(p, trainer=True) for p in points], runs)
    assert level["worst_memory_per_line"] == pytest.approx(1.5)


@pytest.fixture
def report() -> dict:
    """Of every axis' points, made-up times in proportion to their FLOPs."""
    points = list(scaling.POINTS)
    runs = {point.work: [{"seconds": point.flops / 1e11, "peak_mb": 100.0}] for point in points}
    return scaling.report_of(points, runs, 1)


def test_table_and_picture(report, tmp_path):
    assert list(report["axes"]) == ["vocabulary", "length", "pairs", "stages"]
    assert [axis["worst_time_per_flop"] for axis in report["axes"].values()] == pytest.approx([1.0] * 4)
    assert [axis["within_10_percent"] for axis in report["axes"].values()] == [True] * 4
    assert "| vocabulary | 1.00 | yes | 1.00 | 1.00 |" in scaling_report.markdown(report)
    pytest.importorskip("matplotlib")
    scaling_report.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_both_loops_run(tmp_path, monkeypatch):
    point = scaling.Point("pairs", 4, pairs=4, scale=0.05)
    assert scaling.bare_loop(point) > 0
    monkeypatch.setattr(scaling, "SHAPE", replace(scaling.SHAPE, hidden=32, layers=1, intermediate=32))
    scaling.make_model(tmp_path / "model")
    (tmp_path / "run").mkdir()
    assert scaling.whole_fit(replace(point, stages=2), tmp_path / "model", tmp_path / "run") > 0
    assert len(list((tmp_path / "run").glob("s*.jsonl"))) == 2


# ---- GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run("-m", "benchmarks.gpu", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0 and done.stdout.strip() == gpu.NO_GPU
    assert json.loads((tmp_path / "out.json").read_text()) == {"measured": False, "reason": gpu.NO_GPU}


def test_the_tiny_setting_on_a_cpu(tmp_path):
    out = tmp_path / "out.json"
    words = "--device cpu --setting tiny --variants ours packed --length 48 --pairs 4 --step-pairs 2 --json".split()
    done = run("-m", "benchmarks.gpu", *words, str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    keys = {"measured", "setting", "model", "weights", "compute", "trained", "optimizer", "device", "options"}
    assert keys | {"lengths", "versions"} == report.keys()
    (found,) = report["lengths"]
    assert found["variants"].keys() == {"ours", "packed"}
    for result in found["variants"].values():
        assert result["status"] == "measured" and result["micro_batch"] == 2
        assert result["pairs_per_second"] > 0 and len(result["losses"]) == 3
        assert [result[key] for key in ("peak_mb", "useful_mfu", "executed_mfu")] == [None] * 3
    against = found["ours_against"]["packed"]
    assert against["losses_agree"] and against["loss_difference"] <= against["tolerance"] == 2e-5
    assert against["speed"] > 0 and against["memory"] is None


@pytest.mark.parametrize("setting", ["tiny", "tiny_lora"])
def test_all_variants_train_the_same(setting):
    if setting == "tiny_lora":
        pytest.importorskip("peft")
    jobs = [replace(JOB, setting=setting, variant=variant) for variant in ("ours", "packed")]
    jobs += [replace(jobs[0], micro_batch=2), replace(jobs[0], checkpointing=True), replace(jobs[0], offload=True)]
    if gpu.missing("trl_best", SETTINGS[setting]) == "":
        jobs += [replace(jobs[0], variant="trl_default", checkpointing=True), replace(jobs[0], variant="trl_best")]
    losses = [gpu_variants.run(job)["losses"] for job in jobs]
    for job, other in zip(jobs, losses, strict=True):
        assert other == pytest.approx(losses[0], abs=2e-5), job
    # They train: a loss that stays at log 2 would agree with anything.
    assert losses[0][0] == pytest.approx(0.693147, abs=1e-5) and losses[0][2] < 0.65


def test_compiled_layers_are_compiled_once_for_all_batches(monkeypatch):
    import torch._dynamo

    # Tracing is what is tested; generating code takes half a minute.
    compile_module = torch.nn.Module.compile
    eager = partialmethod(compile_module, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # More lengths than Dynamo would compile anew for.
    losses = [gpu_variants.run(replace(JOB, pairs=12, compiled=compiled))["losses"] for compiled in (False, True)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    assert not torch._dynamo.utils.counters["recompile_limit"]


def test_ours_needs_no_other_package():
    absent = "datasets", "jsonargparse", "lightning", "trl", "bitsandbytes", "torchmetrics", "pyarrow"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
        "from benchmarks.gpu_jobs import Job; from benchmarks.gpu_variants import run\n"
        "print(len(run(Job('tiny', 'cpu', length=48, pairs=2, step_pairs=2, micro_batch=2))['losses']))"
    )
    done = run("-c", code)
    assert done.stdout.strip() == "3", done.stderr


def test_what_runs_out_of_memory_is_tried_smaller(monkeypatch, capsys):
    tried = []

    def fake(job: Job) -> dict:
        tried.append((job.micro_batch, job.checkpointing))
        return {"status": "measured" if job.checkpointing and job.micro_batch <= 2 else "out of memory"}

    monkeypatch.setattr(gpu, "run_job", fake)
    best = replace(JOB, variant="trl_best", step_pairs=4)
    assert gpu.largest_fit(best, most=4) == {"status": "measured", "micro_batch": 2, "checkpointing": True}
    # Without checkpointing first, at every size.
    assert tried == [(4, False), (2, False), (1, False), (4, True), (2, True)]
    assert gpu.largest_fit(replace(JOB, step_pairs=4), most=2)["status"] == "out of memory"

    def no_memory(job: Job) -> dict:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(gpu_variants, "run", no_memory)
    capsys.readouterr()
    gpu.child(JOB)
    assert capsys.readouterr().out == 'RESULT {"status": "out of memory"}\n'


def test_no_ratio_where_losses_differ():
    ours = {"losses": [0.69, 0.5], "pairs_per_second": 6.0, "peak_mb": 50.0, "micro_batch": 2}
    peer = {"losses": [0.69, 0.6], "pairs_per_second": 4.0, "peak_mb": 100.0}
    found = gpu.compare(ours, peer, tolerance=0.15)
    assert (found["speed"], found["memory"], found["losses_agree"]) == (1.5, 0.5, True)
    assert (found["loss_difference"], found["loss_moved"]) == pytest.approx((0.1, 0.19))
    # Too far apart, and within a tolerance that the loss hasn't moved by.
    for tolerance in (0.05, 0.25):
        found = gpu.compare(ours, peer, tolerance)
        assert (found["speed"], found["memory"], found["losses_agree"]) == (None, None, False)


def test_executed_flops_count_what_each_variant_does_again():
    jobs = [replace(JOB, variant=variant) for variant in ("ours", "packed", "trl_best")]
    shape, pairs = SETTINGS["tiny"].shape, JOB.timed_pairs
    floor = training_flops(floor_forward(shape, pairs))
    ours, packed, trl = (gpu.executed_flops(job) for job in jobs)
    # Of the passes, three in training and one for the reference, none computes the last layer whole.
    left = left_out(shape, pairs, "shared_prefix", JOB.micro_batch)
    assert floor - 4 * left <= ours < floor and ours < packed < trl
    assert gpu.executed_flops(replace(jobs[0], compiled=True)) == ours + 4 * left >= floor
    again = floor_forward(shape, pairs).head
    assert gpu.executed_flops(replace(jobs[0], logits_budget_mb=0.0)) == ours + again
    forward = executed_forward(shape, pairs, "shared_prefix", 1)
    assert gpu.executed_flops(replace(jobs[0], checkpointing=True)) == ours + forward.body - left + forward.attention


def test_a_long_length_is_one_pair_a_step():
    options = gpu.parse(["--length", "4096", "--shared-nothing", "--checkpointing", "full"])
    job = gpu.job_of(gpu.base_job(options, 4096), "ours", options)
    assert (job.step_pairs, job.checkpointing, job.compiled) == (1, True, False)
    assert job.timed_pairs == [(1, 2048, 2048)] * job.pairs
    assert gpu.job_of(job, "packed", options).compiled
    assert gpu.job_of(job, "trl_default", gpu.parse([])).checkpointing
    with pytest.raises(SystemExit):
        gpu.parse(["--pairs", "20"])
