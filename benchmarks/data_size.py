"""Time and memory of the data path: `python -m benchmarks.data_size --pairs N --json OUT [--num-proc P]`.

N short generated pairs as JSONL, and a word-level tokenizer. Each phase is a process of its own, since a peak of
memory can't be taken back:

| phase | what it does |
|---|---|
| imports | what the others import, and the tokenizer |
| cold | reads and tokenises into an empty cache |
| warm | finds the pairs in the cache, up to the store that the loader reads from |
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
PHASES = ("imports", "cold", "warm", "iterate")


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


def run_phase(phase: str, folder: Path, num_proc: int | None) -> dict[str, float]:
    """One phase, in this process; `HF_DATASETS_CACHE` says where the cache is."""
    import lightning.pytorch  # noqa: F401  a run has it in memory

    from sdpo_lightning.data.collate import PaddedCollator, PairTokenizer
    from sdpo_lightning.data.loader import PairStore, StageLoader, epoch_order
    from sdpo_lightning.data.prepare import Preparation, load_tokenizer, prepare_sources
    from sdpo_lightning.data.sources import PreferenceSource

    tokenize = PairTokenizer(load_tokenizer(str(folder)), MAX_LENGTH)
    figures: dict[str, float] = {}
    if phase != "imports":
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
