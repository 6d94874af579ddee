"""Damaged JSONL through the data path: `python -m benchmarks.fuzz_rows --inputs N --json OUT [--seed S]`.

Each input is a file of two to five rows, mostly of one form, after one to four random changes of its bytes. It is read,
tokenised and collated as `fit` does it. Allowed ends: every row kept or counted by reason, or a `ConfigurationError`
of one line that names the source and a setting. Kept pairs are held against what every pair must be. Anything else is
a fault and kept in the result.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from sdpo_lightning.data.collate import PairTokenizer, SharedPrefixCollator, TokenizedPair
from sdpo_lightning.data.sources import PreferenceSource, load_source
from sdpo_lightning.types import ConfigurationError

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role') }}{% endif %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MAX_LENGTH = 48
PIECES = [
    b"null", b"true", b"[]", b"{}", b'""', b"NaN", b"1e999", b"-0", b'"\\ud83d"', b"\\u0000", "\u2028".encode(),
    b"\xff", b"\x00", b"\n", b"\r\n", b"\\", b'"', b",", b":", b'"prompt": ', b'"chosen": [', b'"role": "user"',
    b'"</s>"', b"</s>", b"\xef\xbb\xbf", "\u202e\u0301\U0001f600".encode(), b"1" * 5000, b"[" * 2000,
    b'{"a":' * 300, b" " * 50,
]  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges, so that every text has ids and prompts merge with answers."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["</s>"], initial_alphabet=alphabet)
    core.train_from_iterator(["what is good", "another answer, another hat: understand?"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


WORDS = ["what", "is", "good", "an\u00e9", "other", "\u7b54", "?"]


def make_row(kind: int, generator: random.Random) -> dict[str, Any]:
    """A row in one of the four forms that are read."""

    def words(most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(0, most)))

    def said(role: str, most: int) -> dict[str, str]:
        return {"role": role, "content": words(most)}

    if kind == 0:
        return {"prompt": words(9), "chosen": words(6), "rejected": words(6)}
    if kind == 1:
        question = f"\n\nHuman: {words(6)}\n\nAssistant:"
        return {"chosen": question + words(5), "rejected": question + words(5)}
    prompt = [said("system", 2)] * generator.randint(0, 1) + [said("user", 5)]
    sides = {side: [said("assistant", 5)] for side in ("chosen", "rejected")}
    if kind == 2:
        return {"prompt": prompt, **sides}
    return {side: prompt + answer for side, answer in sides.items()}


def mutate(data: bytes, generator: random.Random) -> bytes:
    """One random change of some bytes."""
    start = generator.randint(0, len(data))
    end = min(len(data), start + generator.choice((0, 1, 2, 8, 40)))
    part = data[start:end]
    changes: list[Callable[[], bytes]] = [
        lambda: generator.choice(PIECES),
        lambda: b"",
        lambda: part + part,
        lambda: bytes(byte ^ (1 << generator.randrange(8)) for byte in part),
        lambda: generator.randbytes(len(part)),
        lambda: part[::-1],
    ]
    if generator.random() < 0.05:
        return data[:start]
    return data[:start] + generator.choice(changes)() + data[end:]


def make_input(generator: random.Random) -> bytes:
    """The bytes of a file."""
    usual = generator.randrange(4)
    kinds = [usual if generator.random() < 0.95 else generator.randrange(4) for _ in range(generator.randint(2, 5))]
    rows = [make_row(kind, generator) for kind in kinds]
    escaped = generator.random() < 0.5
    data = b"".join(json.dumps(row, ensure_ascii=escaped).encode() + b"\n" for row in rows)
    for _ in range(generator.randint(1, 4)):
        data = mutate(data, generator)
    return data


def run_input(path: Path, tokenize: PairTokenizer, counts: Counter[str]) -> None:
    """Read, tokenise and collate one file.

    Args:
        path: of the file.
        tokenize: tokenizer, limit and rule.
        counts: outcome -> number, added to.

    Raises:
        AssertionError: an end that isn't allowed; other errors are those of the data path.
    """
    try:
        loaded = load_source(PreferenceSource("x", str(path)))
        if loaded.conversational:
            tokenize.check_template("x")
    except ConfigurationError as error:
        text = str(error)
        assert "source 'x'" in text and "`data.sources[x]." in text and len(text.splitlines()) == 1, text
        counts["refused files"] += 1
        return
    assert loaded.total == len(loaded.rows) + sum(loaded.dropped.values()), "rows got lost"
    counts.update({f"dropped: {reason}": count for reason, count in loaded.dropped.items()})
    pairs = []
    for row in loaded.rows:
        pair = tokenize(row["prompt"], row["chosen"], row["rejected"])
        if isinstance(pair, str):
            counts[f"dropped: {pair}"] += 1
        else:
            check_pair(pair)
            pairs.append(pair)
    counts["kept pairs"] += len(pairs)
    counts["read files"] += 1
    if pairs:
        batch = SharedPrefixCollator(0)(range(len(pairs)), pairs, [1.0] * len(pairs), len(pairs))
        assert batch.completion_lengths.min() > 0 and batch.source_index.max() < batch.input_ids.numel()


def check_pair(pair: TokenizedPair) -> None:
    """What holds for every pair.

    Raises:
        AssertionError: it doesn't.
    """
    assert pair.prompt_ids and pair.chosen_ids and pair.rejected_ids, "an empty part"
    assert pair.chosen_ids != pair.rejected_ids, "nothing to prefer"
    assert len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= MAX_LENGTH, "too long"


def fuzz(inputs: int, seed: int) -> dict[str, Any]:
    """Run so many inputs.

    Args:
        inputs: how many.
        seed: input n is a function of seed and n.

    Returns:
        Outcomes counted, and the faults: number, error, bytes in hex.
    """
    transformers_logging.set_verbosity_error()
    tokenizer = make_tokenizer()
    rules = [PairTokenizer(tokenizer, MAX_LENGTH, rule) for rule in ("drop", "truncate_left")]
    counts, faults, begun = Counter(), [], time.perf_counter()
    shm = Path("/dev/shm")
    # Two thirds of the time would go into a fingerprint by `datasets` that nothing here asks for.
    plain = mock.patch("datasets.arrow_dataset.generate_fingerprint", lambda _: "none")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder, plain:
        path = Path(folder) / "rows.jsonl"
        for number in range(inputs):
            data = make_input(random.Random(f"{seed}:{number}"))
            path.write_bytes(data)
            try:
                run_input(path, rules[number % 2], counts)
            except Exception as error:  # noqa: BLE001
                said = f"{type(error).__name__}: {error}"[:500]
                faults.append({"input": number, "error": said, "hex": data[:4000].hex()})
    return {
        "inputs": inputs,
        "seed": seed,
        "seconds": round(time.perf_counter() - begun, 1),
        "python": platform.python_version(),
        "outcomes": dict(sorted(counts.items())),
        "faults": faults,
    }


def main() -> None:
    """The command line; exits with 1 where there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    result = fuzz(arguments.inputs, arguments.seed)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({**result, "faults": result["faults"][:5]}, indent=1))
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
