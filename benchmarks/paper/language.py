"""A generated language whose true preference is known, and two sources of preferences over it. Pure functions.

A prompt reads `curious sailors ask about foxes :`, an answer ` kindly gentle foxes burrow cheers`: an opening, any
number of fillers, an adjective, a topic, a detail and a closing. Its quality is a whole number of points of 100:

| aspect | points | good where |
|---|---|---|
| opening | 20, 10 or 0 | it is a polite, a plain, a rude word |
| adjective | 24 | it is of the register that the prompt's mood asks for |
| topic | 24 | it is the prompt's |
| detail | 16 | it belongs to the prompt's topic |
| closing | 16, 8 or 0 | it is a warm, a plain, a cold word |
| filler | -5 each | |

What isn't of that form has 0 points. An answer is truly preferred to another if it has more of them.

The sources stand for the paper's two (OpenOrca, UltraFeedback; arXiv 2403.19270, section 4.1) at their ratio of 1 : 5:

| source | answers | label |
|---|---|---|
| `orca` | a strong and a weak writer's, who differ in opening, topic, closing | the truth, turned round in 5 % |
| `feedback` | two of the SFT distribution | a rater who sees quality through noise, and likes fillers |
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

Row = dict[str, str]

SOURCES = ("feedback", "orca")
SPLITS = ("train", "validation", "test")
OPENINGS = (("kindly", "gladly"), ("so", "now"), ("ugh", "listen"))
CLOSINGS = (("cheers", "farewell"), ("done", "over"), ("whatever", "enough"))
REGISTERS = (
    ("gentle", "calm", "soft"),
    ("grand", "noble", "fine"),
    ("funny", "silly", "jolly"),
    ("exact", "plain", "dry"),
)
# The register of a mood is its place modulo 4.
MOODS = ("anxious", "formal", "playful", "curious", "tired", "proud", "merry", "strict")
READERS = ("sailors", "bakers", "poets", "nurses", "pupils", "farmers", "tourists", "drivers")
TOPICS = {
    "foxes": ("burrow", "tail"),
    "rivers": ("bank", "flood"),
    "violins": ("bow", "string"),
    "apples": ("peel", "core"),
    "trains": ("rail", "signal"),
    "stars": ("orbit", "light"),
    "bees": ("hive", "honey"),
    "boats": ("mast", "anchor"),
    "bread": ("crust", "dough"),
    "snow": ("drift", "flake"),
    "clocks": ("hand", "gear"),
    "roses": ("thorn", "petal"),
}
FILLERS = ("well", "just", "really", "quite")
WORDS = (
    *("ask", "about", ":"),
    *MOODS,
    *READERS,
    *TOPICS,
    *(word for details in TOPICS.values() for word in details),
    *(word for words in (*OPENINGS, *REGISTERS, *CLOSINGS) for word in words),
    *FILLERS,
)
PROMPT_WORDS, ANSWER_TOKENS = 6, 10

_GRADED = (0, 1, 2)
_OPENING_POINTS, _CLOSING_POINTS = (20, 10, 0), (16, 8, 0)
_REGISTER_POINTS, _TOPIC_POINTS, _DETAIL_POINTS, _FILLER_POINTS = 24, 24, 16, -5


@dataclass(frozen=True)
class Writer:
    """Shares of what a writer does.

    Attributes:
        opening: of good, plain and bad openings.
        closing: of good, plain and bad closings.
        register: of adjectives that fit.
        topic: of right topics.
        detail: of right details.
        fillers: of 0, 1 and 2 fillers.
    """

    opening: tuple[float, float, float]
    closing: tuple[float, float, float]
    register: float
    topic: float
    detail: float
    fillers: tuple[float, float, float] = (0.5, 0.3, 0.2)


# Two kinds of readers are written to in two ways, so that S holds both and there is something for DPO to turn.
SFT_WRITERS = (
    Writer((0.6, 0.25, 0.15), (0.5, 0.3, 0.2), 0.6, 0.8, 0.7),
    Writer((0.2, 0.3, 0.5), (0.15, 0.3, 0.55), 0.35, 0.5, 0.4),
)


def writer_of(prompt: str) -> Writer:
    """The SFT distribution of answers to a prompt: it depends on the reader."""
    return SFT_WRITERS[READERS.index(prompt.split()[1]) % 2]


def strong(writer: Writer) -> Writer:
    """The better half of an `orca` pair."""
    return replace(writer, opening=(0.85, 0.1, 0.05), closing=(0.75, 0.15, 0.1), topic=0.95)


def weak(writer: Writer) -> Writer:
    """The worse half of an `orca` pair."""
    return replace(writer, opening=(0.15, 0.35, 0.5), closing=(0.1, 0.3, 0.6), topic=0.4)


@lru_cache
def prompts_of(split: str) -> tuple[str, ...]:
    """All prompts of a split: no prompt is in two of them, every word in all.

    Args:
        split: one of `SPLITS`; 4, 1 and 1 of 6 prompts.
    """
    found = []
    for mood, reader, topic in product(range(len(MOODS)), range(len(READERS)), range(len(TOPICS))):
        place = (mood + 2 * reader + 3 * (reader // 2) + topic + topic // 6) % 6
        if {4: "validation", 5: "test"}.get(place, "train") == split:
            found.append(f"{MOODS[mood]} {READERS[reader]} ask about {list(TOPICS)[topic]} :")
    return tuple(found)


def draw_answer(rng: random.Random, prompt: str, writer: Writer) -> str:
    """One answer, which starts with a space."""
    mood, _, _, _, topic, _ = prompt.split()
    own = MOODS.index(mood) % len(REGISTERS)
    opening = rng.choice(rng.choices(OPENINGS, writer.opening)[0])
    closing = rng.choice(rng.choices(CLOSINGS, writer.closing)[0])
    others = [register for place, register in enumerate(REGISTERS) if place != own]
    adjective = rng.choice(REGISTERS[own] if rng.random() < writer.register else rng.choice(others))
    rivals = [name for name in TOPICS if name != topic]
    named = topic if rng.random() < writer.topic else rng.choice(rivals)
    detail = rng.choice(TOPICS[topic if rng.random() < writer.detail else rng.choice(rivals)])
    fillers = rng.choices(FILLERS, k=rng.choices(_GRADED, writer.fillers)[0])
    return " " + " ".join([opening, *fillers, adjective, named, detail, closing])


def parsed(answer: str) -> tuple[int, int, int, str, str, int] | None:
    """Grade of the opening, fillers, register, topic, detail, grade of the closing; None where it isn't of the form."""
    words = answer.split()
    count = sum(word in FILLERS for word in words)
    opening = next((grade for grade in _GRADED if words and words[0] in OPENINGS[grade]), None)
    # Fillers stand between the opening and the adjective, nowhere else.
    tail = words[1 + count :]
    if opening is None or len(tail) != 4 or any(word in FILLERS for word in tail):
        return None
    adjective, named, detail, last = tail
    register = next((place for place, register in enumerate(REGISTERS) if adjective in register), None)
    closing = next((grade for grade in _GRADED if last in CLOSINGS[grade]), None)
    if register is None or closing is None or named not in TOPICS or not any(detail in d for d in TOPICS.values()):
        return None
    return opening, count, register, named, detail, closing


def quality(prompt: str, answer: str) -> int:
    """Points of an answer, 0 to 100; 0 where it isn't of the form."""
    if (parts := parsed(answer)) is None:
        return 0
    opening, count, register, named, detail, closing = parts
    mood, _, _, _, topic, _ = prompt.split()
    points = _OPENING_POINTS[opening] + _CLOSING_POINTS[closing] + _FILLER_POINTS * count
    points += _REGISTER_POINTS * (register == MOODS.index(mood) % len(REGISTERS))
    points += _TOPIC_POINTS * (named == topic) + _DETAIL_POINTS * (detail in TOPICS[topic])
    return max(0, points)


@lru_cache
def quality_shares(writer: Writer) -> Mapping[int, float]:
    """Points -> probability, of a writer's answers to any prompt: exactly, by enumeration."""
    shares: dict[int, float] = {}
    yes_no = [((1, share), (0, 1 - share)) for share in (writer.register, writer.topic, writer.detail)]
    graded = [tuple(enumerate(w)) for w in (writer.opening, writer.closing, writer.fillers)]
    for (register, a), (topic, b), (detail, c), (o, d), (e, f), (n, g) in product(*yes_no, *graded):
        points = _OPENING_POINTS[o] + _CLOSING_POINTS[e] + _FILLER_POINTS * n
        points += _REGISTER_POINTS * register + _TOPIC_POINTS * topic + _DETAIL_POINTS * detail
        shares[max(0, points)] = shares.get(max(0, points), 0.0) + a * b * c * d * f * g
    return shares


def preference(prompt: str, answer: str) -> float:
    """Chance that an answer is truly preferred to one of the SFT distribution to the same prompt; a tie is 1/2.

    The SFT distribution itself has 1/2 on average.
    """
    shares, points = quality_shares(writer_of(prompt)), quality(prompt, answer)
    return sum(share * ((other < points) + 0.5 * (other == points)) for other, share in shares.items())


@dataclass(frozen=True)
class Rater:
    """Who labels `feedback`, by a Bradley-Terry model.

    Attributes:
        noise: points of quality to which the odds are e : 1.
        filler_bias: points that each filler seems to be worth, beyond its true ones.
    """

    noise: float = 20.0
    filler_bias: float = 12.0

    def prefers_first(self, rng: random.Random, prompt: str, first: str, second: str) -> bool:
        """A draw."""
        seen = [quality(prompt, a) + self.filler_bias * sum(w in FILLERS for w in a.split()) for a in (first, second)]
        return rng.random() < 1 / (1 + math.exp((seen[1] - seen[0]) / self.noise))


def _candidates(rng: random.Random, source: str, prompt: str) -> tuple[str, str]:
    """Two answers, of `orca` the strong writer's first."""
    writer = writer_of(prompt)
    if source == "orca":
        return draw_answer(rng, prompt, strong(writer)), draw_answer(rng, prompt, weak(writer))
    return draw_answer(rng, prompt, writer), draw_answer(rng, prompt, writer)


def _pairs(rng: random.Random, source: str, split: str, rater: Rater) -> Iterator[Row]:
    while True:
        prompt = rng.choice(prompts_of(split))
        first, second = _candidates(rng, source, prompt)
        points = quality(prompt, first), quality(prompt, second)
        if first == second or (points[0] == points[1] and (split != "train" or source == "orca")):
            # Without a true preference it can't be held against a model.
            continue
        right = points[0] > points[1]
        if split != "train":
            first_wins = right
        elif source == "orca":
            first_wins = right if rng.random() >= 0.05 else not right
        else:
            first_wins = rater.prefers_first(rng, prompt, first, second)
        chosen, rejected = (first, second) if first_wins else (second, first)
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def make_pairs(source: str, count: int, seed: int, split: str = "train", rater: Rater | None = None) -> list[Row]:
    """Pairs of a source.

    Args:
        source: one of `SOURCES`.
        count: of pairs.
        seed: the same gives the same pairs.
        split: of the prompts; labels are the source's own in `train`, else the truth.
        rater: who labels `feedback`.

    Raises:
        ValueError: an unknown source or split.
    """
    if source not in SOURCES or split not in SPLITS:
        raise ValueError(f"source {source!r}, split {split!r}: expected one of {SOURCES} and of {SPLITS}")
    pairs = _pairs(random.Random(f"{source}/{split}/{seed}"), source, split, rater or Rater())
    return [next(pairs) for _ in range(count)]


def wrong_share(rows: list[Row]) -> float:
    """Share of pairs whose rejected answer is truly preferred; ties 1/2."""
    gaps = [quality(row["prompt"], row["chosen"]) - quality(row["prompt"], row["rejected"]) for row in rows]
    return sum((gap < 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)
