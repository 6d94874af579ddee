"""Rank 1: the model card of M_t. Nothing in it depends on a clock: an export that is made again is the same."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from sdpo_lightning.redaction import hide_in_text

CITATION = """@article{kim2024sdpo,
  title={sDPO: Don't Use Your Data All at Once},
  author={Kim, Dahyun and Kim, Yungi and Song, Wonho and Kim, Hyeonwoo and Kim, Yunsu and Kim, Sanghoon
          and Park, Chanjun},
  journal={arXiv preprint arXiv:2403.19270},
  year={2024}
}"""

_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "gamma", "gamma_ref", "pairs")


@dataclass(frozen=True)
class CardSource:
    """One source as a card names it: a hub name, or a file's name without its folder."""

    name: str
    origin: str
    is_hub: bool


@dataclass(frozen=True)
class CardFacts:
    """What a card says of M_t.

    Attributes:
        index: t.
        num_stages: T.
        stage: name of stage t.
        pairs: of the stage.
        data_digest: sha256 over its tokenised rows.
        base: S, a hub name or the name of its folder.
        base_is_hub: whether it can be found on the hub.
        base_digest: of S's weights.
        digest: of M_t's weights.
        reference: what the reference was in this stage, as `M_1`.
        reference_digest: of its weights.
        is_adapter: whether the folder holds an adapter of S.
        sources: of the stage.
        settings: what a resumed run must agree on.
        metrics: column of `metrics.csv` -> its last value in the stage.
        versions: package -> version.
        notes: what the user was told and accepted.
        ended: where and why a stop rule ended the stage; "" where its plan was finished.
    """

    index: int
    num_stages: int
    stage: str
    pairs: int
    data_digest: str
    base: str
    base_is_hub: bool
    base_digest: str
    digest: str
    reference: str
    reference_digest: str
    is_adapter: bool
    sources: Sequence[CardSource]
    settings: Mapping[str, object]
    metrics: Mapping[str, str]
    versions: Mapping[str, str]
    notes: Sequence[str] = field(default_factory=tuple)
    ended: str = ""


def model_card(facts: CardFacts) -> str:
    """The README.md of M_t's folder, without anything that looks like a secret."""
    data = ModelCardData(
        base_model=facts.base if facts.base_is_hub else None,
        datasets=[source.origin for source in facts.sources if source.is_hub] or None,
        library_name="peft" if facts.is_adapter else "transformers",
        tags=["dpo", "stepwise-dpo", "sdpo-lightning"],
    )
    title = f"# M_{facts.index} of {facts.num_stages}: {facts.base} after stage {facts.stage!r}"
    intro = (
        f"{'An adapter of' if facts.is_adapter else 'A model from'} `{facts.base}` by stepwise DPO "
        "([sDPO, arXiv 2403.19270](https://arxiv.org/abs/2403.19270)), trained with sdpo_lightning."
    )
    parts = [title, intro, _stage_table(facts), *_notes(facts), _metrics_table(facts.metrics), _settings(facts)]
    parts += [_use(facts), f"## Citation\n```bibtex\n{CITATION}\n```"]
    # `ModelCard` checks the header's form.
    return str(ModelCard(hide_in_text(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")))


def use_lines(folder: str, base: str, is_adapter: bool) -> list[str]:
    """The commands that serve a folder with vLLM and evaluate it with lm-eval.

    Args:
        folder: of M_t.
        base: S.
        is_adapter: whether the folder holds an adapter of S.
    """
    if is_adapter:
        name = Path(folder).name
        return [
            f"vllm serve {base} --enable-lora --lora-modules {name}={folder}",
            f"lm_eval --model hf --model_args pretrained={base},peft={folder},dtype=bfloat16 --tasks arc_challenge",
        ]
    return [
        f"vllm serve {folder} --dtype bfloat16",
        f"lm_eval --model hf --model_args pretrained={folder},dtype=bfloat16 --tasks arc_challenge",
    ]


def stage_metrics(path: Path, stage_index: int) -> dict[str, str]:
    """The last value of each column that a card shows in the rows of one stage; empty where there is no file.

    Args:
        path: of `metrics.csv`.
        stage_index: t.
    """
    if not path.exists():
        return {}
    with path.open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["stage/index"] == str(stage_index)]
    shown = tuple(f"/{name}" for name in _SHOWN)
    found: dict[str, str] = {}
    for row in rows:
        found |= {key: value for key, value in row.items() if value and key.endswith(shown)}
    return found


def _stage_table(facts: CardFacts) -> str:
    sources = ", ".join(f"{source.name} (`{source.origin}`)" for source in facts.sources)
    rows = {
        "stage": f"{facts.index} of {facts.num_stages}, {facts.stage}",
        "sources": sources,
        "pairs": f"{facts.pairs}",
        **({"ended before its plan": facts.ended} if facts.ended else {}),
        "tokenised rows, sha256": f"`{facts.data_digest}`",
        "reference": f"{facts.reference}, weights' sha256 `{facts.reference_digest}`",
        "S, weights' sha256": f"`{facts.base_digest}`",
        f"M_{facts.index}, weights' sha256": f"`{facts.digest}`",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _notes(facts: CardFacts) -> list[str]:
    return ["## Accepted changes\n" + "\n".join(f"- {note}" for note in facts.notes)] if facts.notes else []


def _metrics_table(metrics: Mapping[str, str]) -> str:
    lines = ["## At the end of the stage", "| metric | value |", "|---|---|"]
    return "\n".join(lines + [f"| `{key}` | {float(value):.4f} |" for key, value in metrics.items()])


def _settings(facts: CardFacts) -> str:
    values = [f"- `{key}`: {value}" for key, value in facts.settings.items()]
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return "\n".join(["## Settings", *values, f"- versions: {versions}"])


def _use(facts: CardFacts) -> str:
    return "## Use\n```bash\n" + "\n".join(use_lines(".", facts.base, facts.is_adapter)) + "\n```"
