"""Rank 1: the one way in which models answer prompts: `Generator`, and how an answer is drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from sdpo_lightning.types import ConfigurationError

Message = dict[str, str]
# Plain text that the answer continues, or a dialogue that ends with a turn of the user's.
Prompt = str | list[Message]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: of the distribution; 0 takes the likeliest token each time.
        top_p: share of the probability that tokens are drawn from.
        answers: drawn for each prompt.
        seed: of the draws.

    Raises:
        ConfigurationError: a number outside its range, or several answers that would all be the same.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    answers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("answers", 1), ("temperature", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"`{name}` of Sampling is {getattr(self, name)}, expected at least {least}")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"`top_p` of Sampling is {self.top_p}, expected within (0, 1]")
        if self.answers > 1 and not self.temperature:
            raise ConfigurationError(
                f"`answers` of Sampling is {self.answers} at temperature 0, where all are the same; raise `temperature`"
            )


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens; of a text prompt its continuation, so perhaps with a space in front.
        finished: the model ended it; else `max_new_tokens` cut it off.
    """

    text: str
    finished: bool


class Generator(ABC):
    """A model that answers prompts, wherever it runs.

    Usable as a context: on leaving it `close` frees what it holds.
    """

    @property
    @abstractmethod
    def model_name(self) -> str:
        """What answers, for records. No secret."""

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Answer]]:
        """Answer each prompt `sampling.answers` times.

        Args:
            prompts: P of them.
            sampling: how.

        Returns:
            P lists, in the order of the prompts.

        Raises:
            ConfigurationError: prompts that this model can't take.
            OSError: the model can't be reached, or has failed.
        """

    def close(self) -> None:  # noqa: B027
        """Free memory and processes. It may be used again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Tokens of a prompt: text as it stands, a dialogue by the chat template with the answer's opening.

    Args:
        tokenizer: the model's.
        prompt: text or dialogue.

    Raises:
        ConfigurationError: a dialogue for a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise ConfigurationError(
            f"the prompts are dialogues, and the tokenizer of {tokenizer.name_or_path!r} has no chat template; give "
            "them as text, or a model with a template"
        )
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))
