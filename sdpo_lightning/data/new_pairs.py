"""Rank 2: pairs that the just-trained model helps to make: `PairSource`, and `SampledPairs` (self-rewarding).

The sDPO paper names it as future work (section 1); Yuan et al. 2024 (arXiv 2401.10020) train on such pairs.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from sdpo_lightning.files import file_digest
from sdpo_lightning.generation import Answer, Generator, Message, Prompt, Sampling
from sdpo_lightning.types import ConfigurationError

# A row as a data file has it, or why there is none.
RowOrReason = dict[str, Any] | str
# prompt, answers -> a score of each, higher = better.
Scorer = Callable[[Prompt, Sequence[str]], Sequence[float]]
# Of a source that gives fewer rows than it has declared.
FewRule = Literal["error", "repeat"]


class PairSource(ABC):
    """Pairs of one stage, made just before it. A subclass is a dataclass whose fields are its settings.

    Attributes:
        name: of the stage.
        num_pairs: declared beforehand, because the plan is; rows are taken until so many can be trained on.
        on_few: where there are fewer: `error`, or `repeat` those there are in turn.
    """

    name: str
    num_pairs: int
    on_few: FewRule = "error"

    @abstractmethod
    def pairs(self, generator: Generator, stage_index: int) -> Iterator[RowOrReason]:
        """Rows for stage t, in order; asked for one by one, and no more than are needed.

        Must be a pure function of M_{t-1}, the settings and t: a run that is killed here asks again.

        Args:
            generator: M_{t-1}.
            stage_index: t.

        Returns:
            For each try a row with `prompt`, `chosen` and `rejected`, as texts or as messages; or in words why it gave
            none, which is counted.
        """

    def settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must agree on."""
        given = {key: value for key, value in asdict(self).items() if key != "on_few"}  # type: ignore[call-overload]
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **given}


@dataclass(frozen=True)
class SampledPairs(PairSource):
    """Several answers a prompt from M_{t-1}, scored by your function: the best against the worst.

    Left out and counted: prompts with fewer than two whole answers (others are cut off by the limit of tokens, or
    empty), and prompts whose best and worst score, or text, are the same. Of equal scores the earlier answer counts.

    Attributes:
        name: of the stage.
        num_pairs: as in `PairSource`.
        prompts: JSON lines with `prompt`, a text or a list of messages that ends with the user's; taken in order.
        scorer: importable path of a function `(prompt, answers) -> scores`, higher = better.
        answers: sampled a prompt.
        max_new_tokens: most tokens of an answer.
        temperature: of the sampling.
        top_p: of the sampling.
        seed: of the sampling.
        prompts_at_once: that are answered before the scorer is asked.
        min_gap: least difference of best and worst score.
        on_few: as in `PairSource`.

    Raises:
        ConfigurationError: a number outside its range.
    """

    name: str
    num_pairs: int
    prompts: str
    scorer: str
    answers: int = 4
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    prompts_at_once: int = 8
    min_gap: float = 0.0
    on_few: FewRule = "error"

    def __post_init__(self) -> None:
        if self.answers < 2 or self.prompts_at_once < 1 or not 0 <= self.min_gap < math.inf:
            raise ConfigurationError(
                f"`answers` {self.answers}, `prompts_at_once` {self.prompts_at_once}, `min_gap` {self.min_gap} of "
                f"SampledPairs {self.name!r}: expected at least 2, at least 1, at least 0"
            )
        self._sampling(0)

    def settings(self) -> dict[str, Any]:
        """With a digest of the prompts in place of their path."""
        path = Path(self.prompts)
        if not path.is_file():
            raise ConfigurationError(f"`prompts` of SampledPairs {self.name!r}: there is no file {self.prompts!r}")
        return super().settings() | {"prompts": file_digest(path)}

    def pairs(self, generator: Generator, stage_index: int) -> Iterator[RowOrReason]:
        """See `PairSource.pairs`.

        Raises:
            ConfigurationError: no such file or function, or scores that aren't numbers.
        """
        prompts, scorer = read_prompts(Path(self.prompts)), find_scorer(self.scorer)
        for start in range(0, len(prompts), self.prompts_at_once):
            part = prompts[start : start + self.prompts_at_once]
            seed = self.seed * 1_000_003 + stage_index * 10_007 + start
            for prompt, answers in zip(part, generator.generate(part, self._sampling(seed)), strict=True):
                yield self._best_against_worst(prompt, answers, scorer)

    def _sampling(self, seed: int) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.answers, seed)

    def _best_against_worst(self, prompt: Prompt, answers: Sequence[Answer], scorer: Scorer) -> RowOrReason:
        texts = [answer.text for answer in answers if answer.finished and answer.text.strip()]
        if len(texts) < 2:
            return "fewer than two whole answers"
        scores = [float(value) for value in scorer(prompt, texts)]
        if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
            raise ConfigurationError(
                f"`scorer` {self.scorer!r} gave {scores} for {len(texts)} answers, expected a finite number for each"
            )
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        if scores[best] == scores[worst] or texts[best] == texts[worst]:
            return "tie"
        if scores[best] - scores[worst] < self.min_gap:
            return "below min_gap"
        chosen, rejected = (_side(prompt, texts[place]) for place in (best, worst))
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "scores": [scores[best], scores[worst]]}


def _side(prompt: Prompt, text: str) -> str | list[Message]:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text.strip()}]


def read_prompts(path: Path) -> list[Prompt]:
    """The `prompt` of each line.

    Args:
        path: JSON lines.

    Raises:
        ConfigurationError: no such file, or a line of another form.
    """
    if not path.is_file():
        raise ConfigurationError(f"`prompts` of SampledPairs: there is no file {str(path)!r}")
    found: list[Prompt] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        dialogue = isinstance(prompt, list) and bool(prompt) and all(_is_message(message) for message in prompt)
        if not (dialogue and prompt[-1]["role"] == "user") and not (isinstance(prompt, str) and prompt.strip()):
            raise ConfigurationError(
                f"{path}, line {number}: expected an object with `prompt`, a text or messages that end with the user's"
            )
        found.append(prompt)
    return found


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def find_scorer(path: str) -> Scorer:
    """The function of a dotted path.

    Raises:
        ConfigurationError: there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name) if module else None
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"`scorer` is {path!r}: {error}; expected `module.function`") from error
    if not callable(found):
        raise ConfigurationError(f"`scorer` is {path!r}, expected `module.function`")
    return found


@dataclass(frozen=True)
class DeclaredPairs(PairSource):
    """Stands for a source whose code isn't run, where only the plan is looked at.

    Attributes:
        name: of the stage.
        num_pairs: as in `PairSource`.
    """

    name: str
    num_pairs: int

    def pairs(self, generator: Generator, stage_index: int) -> Iterator[RowOrReason]:
        """None."""
        return iter(())


def read_pair_sources(values: Sequence[Mapping[str, Any]] | None) -> list[PairSource]:
    """`data.pair_sources` of plain values: ours are made, of other classes only name and number are taken.

    Args:
        values: `class_path` and `init_args` of each.

    Raises:
        ConfigurationError: settings outside their range, or no name and number.
    """
    found: list[PairSource] = []
    for value in values or []:
        given = dict(value.get("init_args") or {})
        if value["class_path"] in (f"{__name__}.SampledPairs", "sdpo_lightning.SampledPairs"):
            found.append(SampledPairs(**given))
        elif {"name", "num_pairs"} <= given.keys():
            found.append(DeclaredPairs(given["name"], given["num_pairs"]))
        else:
            raise ConfigurationError(
                f"`data.pair_sources`: {value['class_path']} has no `name` and `num_pairs` among its settings"
            )
    return found
