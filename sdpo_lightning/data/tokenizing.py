"""Rank 3: canonical rows -> Arrow files of tokenised pairs, in this process or in several.

The processes are started as programs of their own: a fork would copy locks that threads of NCCL or of a tokenizer
hold, and `multiprocessing`'s spawn would run the user's script again.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from datasets.utils import tqdm

from sdpo_lightning.data.collate import TOO_LONG, PairTokenizer
from sdpo_lightning.data.messages import Text, unpack
from sdpo_lightning.data.rated import NUMBERS
from sdpo_lightning.data.tables import TableWriter
from sdpo_lightning.types import ConfigurationError

# A process takes seconds to start; below so many rows this one is done sooner.
SMALL_SOURCE = 2000
_ROWS_PER_PROCESS = 10_000
_TICK_ROWS = 100
_IDS = datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features(
    {
        "pair_id": datasets.Value("int64"),
        "prompt_ids": _IDS,
        "chosen_ids": _IDS,
        "rejected_ids": _IDS,
        "prompt_key": datasets.Value("int64"),
        "chosen_unscored": _IDS,
        "rejected_unscored": _IDS,
        **dict.fromkeys(NUMBERS, datasets.Value("float64")),
    }
)


@dataclass(frozen=True)
class Shard:
    """A run of rows that one process tokenises.

    Attributes:
        rows: Arrow file of canonical rows.
        start: first row.
        stop: row after the last.
        tokenize: tokenizer and length limit.
        stop_at_bad_row: whether the first row that would be dropped ends the work.
        out: Arrow file to write: `pair_id`, ids of prompt, chosen and rejected, `prompt_key`, what isn't scored of
            chosen and rejected (begin, end, begin, end, ...), `pair_score` and `prompt_score` or null.
    """

    rows: Path
    start: int
    stop: int
    tokenize: PairTokenizer
    stop_at_bad_row: bool
    out: Path


@dataclass
class Tokenized:
    """What became of the rows of some shards.

    Attributes:
        files: Arrow files of the pairs, in the order of the rows.
        pairs: how many.
        dropped: reason -> number of rows dropped for it, in the order of their first rows.
        marks: what happened to kept pairs -> how many; see `TokenizedPair`.
        bad: `pair_id` of and reason for the first dropped row, where that ends the work.
    """

    files: list[Path] = field(default_factory=list)
    pairs: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)
    bad: tuple[int, str] | None = None

    def add(self, other: Tokenized) -> None:
        """Take over the shards behind these."""
        self.files += other.files
        self.pairs += other.pairs
        for mine, theirs in ((self.dropped, other.dropped), (self.marks, other.marks)):
            for reason, count in theirs.items():
                mine[reason] = mine.get(reason, 0) + count
        self.bad = self.bad or other.bad


def prompt_key(prompt: Text) -> int:
    """A number for the prompt, int64. Two of a million prompts share one with a chance of 3e-8."""
    digest = hashlib.blake2b(str(prompt).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def check_processes(num_proc: int | None) -> None:
    """Check `data.num_proc`.

    Raises:
        ConfigurationError: below 1.
    """
    if num_proc is not None and num_proc < 1:
        raise ConfigurationError(f"`data.num_proc` is {num_proc}, expected at least 1 or null")


def processes(num_proc: int | None, rows: int, local_ranks: int) -> int:
    """Processes that tokenise one source.

    Args:
        num_proc: `data.num_proc`; None is the share of one rank in the CPUs, as long as each has enough to do.
        rows: of the source.
        local_ranks: processes of the run on this machine.
    """
    if rows < SMALL_SOURCE:
        return 1
    if num_proc is not None:
        return min(num_proc, rows)
    cpus = os.cpu_count() or 1
    try:
        bound = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        bound = cpus
    # Where a launcher gave each rank CPUs of its own, those are its share already.
    return max(1, min(bound, cpus // local_ranks, rows // _ROWS_PER_PROCESS))


def tokenize_rows(
    rows: Path, total: int, tokenize: PairTokenizer, stop_at_bad_row: bool, num_proc: int, out: Path, title: str
) -> Tokenized:
    """Tokenise the rows of an Arrow file; the same pairs in the same order by however many processes.

    Args:
        rows: Arrow file of canonical rows.
        total: rows in it.
        tokenize: tokenizer and length limit.
        stop_at_bad_row: whether the first row that would be dropped ends the work.
        num_proc: processes; 1 is this one.
        out: files are written beside it, as `out-00000.arrow`.
        title: of the progress bar, which shows on a terminal only.

    Raises:
        RuntimeError: a process that came to an unexpected end; its own message stands on stderr.
    """
    bounds = [total * n // num_proc for n in range(num_proc + 1)]
    shards = [
        Shard(rows, bounds[n], bounds[n + 1], tokenize, stop_at_bad_row, out.with_name(f"{out.name}-{n:05d}.arrow"))
        for n in range(num_proc)
    ]
    done = Tokenized()
    with tqdm(total=total, desc=title, unit=" pairs", disable=None, leave=False) as bar:
        for result in [tokenize_shard(shards[0], bar.update)] if num_proc == 1 else _in_processes(shards, bar.update):
            done.add(result)
    return done


def tokenize_shard(shard: Shard, progress: Callable[[int], object]) -> Tokenized:
    """Tokenise a run of rows in this process.

    Args:
        shard: which rows, and how.
        progress: told of each `_TICK_ROWS` rows.
    """
    result = Tokenized([shard.out])
    writer = TableWriter(_FEATURES, shard.out)
    rows = datasets.Dataset.from_file(str(shard.rows)).select(range(shard.start, shard.stop))
    packed = "extras" in rows.column_names
    for number, row in enumerate(rows, start=1):
        if number % _TICK_ROWS == 0:
            progress(_TICK_ROWS)
        sides = ("prompt", "chosen", "rejected")
        prompt, chosen, rejected = (unpack(row[side]) if packed else row[side] for side in sides)
        pair = shard.tokenize(prompt, chosen, rejected, row["extras"] if packed else "")
        if isinstance(pair, str):
            result.dropped[pair] = result.dropped.get(pair, 0) + 1
            if shard.stop_at_bad_row or (pair == TOO_LONG and shard.tokenize.on_long_prompt == "error"):
                result.bad = row["pair_id"], pair
                break
            continue
        ids = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        unscored = ([n for run in runs for n in run] for runs in (pair.chosen_unscored, pair.rejected_unscored))
        # Of the messages themselves: the same prompt may stand in another source or file whose rows aren't packed.
        writer.add((row["pair_id"], *ids, prompt_key(prompt), *unscored, *map(row.get, NUMBERS)))
        result.pairs += 1
        for mark in pair.marks:
            result.marks[mark] = result.marks.get(mark, 0) + 1
    writer.finish()
    return result


def _in_processes(shards: list[Shard], progress: Callable[[int], object]) -> list[Tokenized]:
    # Not `-m`: its classes would be those of `__main__`.
    command = [sys.executable, "-c", f"from {__name__} import main; main()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"}
    answers = [bytearray() for _ in shards]
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for answer, shard in zip(answers, shards, strict=True):
            # A pipe would hold up this process until the other has imported all it needs.
            with tempfile.TemporaryFile() as order:
                pickle.dump(shard, order)
                order.seek(0)
                process = subprocess.Popen(command, env=environment, stdin=order, stdout=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ, answer)
        while selector.get_map():
            for key, _ in selector.select():
                told = os.read(key.fd, 1 << 16)
                if _END not in key.data:
                    progress(told.partition(_END)[0].count(_TICK) * _TICK_ROWS)
                key.data.extend(told)
                if not told:
                    selector.unregister(key.fileobj)
    results = []
    for answer in answers:
        _, marked, result = bytes(answer).partition(_END)
        if not marked:
            raise RuntimeError("a process that tokenises came to an unexpected end; `data.num_proc: 1` needs none")
        results.append(pickle.loads(result))
    return results


# What a process tells on its stdout: a tick for some rows done, then the end mark and its result.
_TICK, _END = b".", b"\n"


def main() -> None:
    """Tokenise the shard that stands on stdin."""
    shard = pickle.load(sys.stdin.buffer)
    # What a tokenizer may print would be taken for the answer.
    out, sys.stdout = sys.stdout.buffer, sys.stderr

    def tick(_: int) -> None:
        out.write(_TICK)
        out.flush()

    result = tokenize_shard(shard, tick)
    out.write(_END + pickle.dumps(result))
    out.flush()


if __name__ == "__main__":
    main()
