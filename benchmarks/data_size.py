"""Time and memory of the data path: `python -m benchmarks.data_size --pairs N --json OUT [--num-proc P]`.

N short generated pairs as JSONL, and a word-level tokenizer. Each phase is a process of its own, since a peak of
memory can't be taken back:

| phase | what it does |
|---|---|
| imports | what the others import, and the tokenizer |
| cold | reads and tokenises into an empty cache |
| warm | finds the pairs in the cache, up to the store that the loader reads from |
| rank | the verb `rank` with `data.rank_sample` 2000 and a model of 2 small layers, from the cache |
| iterate | as warm, then one whole shuffled pass of the loader, 4 pairs a micro-batch, padded rows |

Memory is VmHWM: it counts pages of the memory-mapped files too, which the system can take back.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

VOCAB, MAX_LENGTH, MICRO_BATCH = 16_000, 128, 4
SAMPLE = 2000
PHASES = ("imports", "cold", "warm", "rank", "iterate")


def write_rows(path: Path, pairs: int, seed: int = 0) -> None:
    """Prompts of 4 to 12 words, answers of 4 to 16."""
    generator = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(f"t{generator.randrange(VOCAB - 10)}" for _ in range(generator.randint(4, most)))

    with path.open("w") as file:
        for _ in range(pairs):
            row = {"prompt": words(12), "chosen": " " + words(16), "rejected": " " + words(16)}
            file.write(json.dumps(row) + "\n")


def write_tokenizer(folder: Path) -> None:
    """One id a word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"t{i}" for i in range(VOCAB - 3))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)


def clocks() -> tuple[float, float]:
    """Wall time; CPU time of this process and of those that it waited for."""
    used = os.times()
    return time.perf_counter(), used.user + used.system + used.children_user + used.children_system


def since(began: tuple[float, float], what: str) -> dict[str, float]:
    """Seconds since `clocks` gave `began`."""
    wall, cpu = (now - before for now, before in zip(clocks(), began, strict=True))
    return {f"{what}_seconds": wall, f"{what}_cpu_seconds": cpu}


def write_model(folder: Path) -> None:
    """Beside the tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, pad_token_id=0, eos_token_id=1, **sizes)).save_pretrained(folder)


def rank(folder: Path, num_proc: int | None) -> dict[str, float]:
    """The order and its standard error, as a user asks for it."""
    from sdpo_lightning.cli import main

    began = clocks()
    words = ["rank", f"--model.model_name_or_path={folder}", f"--trainer.default_root_dir={folder / 'run'}"]
    words += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--data.rank_sample={SAMPLE}"]
    words += [f"--data.sources=[{{name: pairs, path: {folder / 'pairs.jsonl'}}}]", f"--data.max_length={MAX_LENGTH}"]
    main(words if num_proc is None else [*words, f"--data.num_proc={num_proc}"])
    (source,) = json.loads((folder / "run" / "curriculum.json").read_text())["sources"]
    return since(began, "rank") | {key: source[key] for key in ("pairs", "reward_accuracy", "standard_error")}


def run_phase(phase: str, folder: Path, num_proc: int | None) -> dict[str, float]:
    """One phase, in this process; `HF_DATASETS_CACHE` says where the cache is."""
    import lightning.pytorch  # noqa: F401  a run has it in memory

    from sdpo_lightning.data.collate import PaddedCollator, PairTokenizer
    from sdpo_lightning.data.loader import PairStore, StageLoader, epoch_order
    from sdpo_lightning.data.prepare import Preparation, load_tokenizer, prepare_sources
    from sdpo_lightning.data.sources import PreferenceSource

    tokenize = PairTokenizer(load_tokenizer(str(folder)), MAX_LENGTH)
    figures: dict[str, float] = {}
    if phase == "rank":
        figures = rank(folder, num_proc)
    elif phase != "imports":
        began = clocks()
        source = PreferenceSource("pairs", str(folder / "pairs.jsonl"))
        (report,), parts = prepare_sources([source], Preparation(tokenize, num_proc=num_proc))
        store = PairStore(parts)
        figures = since(began, "start") | {"pairs": report.pairs}
    if phase == "iterate":
        began = clocks()
        order = epoch_order(report.train_ids, 0, "pairs", 0)
        loader = StageLoader(store, PaddedCollator(0, 64), order, MICRO_BATCH)
        figures["tokens"] = sum(batch.num_tokens for batch in loader)
        figures |= since(began, "pass")
    status = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in status if line.endswith("kB")}
    return figures | {"peak_mib": sizes["VmHWM"], "mapped_mib_at_end": sizes["RssFile"]}


def measure(pairs: int, num_proc: int | None) -> dict[str, dict[str, float]]:
    """All phases, each in a process of its own."""
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder / "pairs.jsonl", pairs)
        write_tokenizer(folder)
        write_model(folder)
        environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
        for phase in PHASES:
            words = [sys.executable, "-m", "benchmarks.data_size", "--phase", phase, "--folder", scratch]
            words += [] if num_proc is None else ["--num-proc", str(num_proc)]
            done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            results[phase] = json.loads(done.stdout.splitlines()[-1])
            print(phase, results[phase], file=sys.stderr, flush=True)
        mib = {"jsonl": (folder / "pairs.jsonl").stat().st_size / 2**20}
        mib["cache"] = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file()) / 2**20
    return results | {"files_mib": mib}


def machine() -> dict[str, object]:
    """Processor, cores that this process may use, versions."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "lightning")
    return {
        "processor": names[0].split(": ")[1] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def main() -> None:
    """Measure, or run one phase of a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="results are added to this file")
    parser.add_argument("--num-proc", type=int, default=None)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        print(json.dumps(run_phase(arguments.phase, arguments.folder, arguments.num_proc)))
        return
    run = {"pairs": arguments.pairs, "num_proc": arguments.num_proc, "machine": machine()}
    run |= measure(arguments.pairs, arguments.num_proc)
    if arguments.json:
        runs = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        arguments.json.write_text(json.dumps([*runs, run], indent=2) + "\n")


if __name__ == "__main__":
    main()
