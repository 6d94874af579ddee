"""Rank 4: what the verb `check` says of prepared data: sources, lengths, and pairs as the loss sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from sdpo_lightning.data.collate import TokenizedPair
from sdpo_lightning.data.findings import Finding, length_line
from sdpo_lightning.data.loader import PairStore
from sdpo_lightning.data.survey import Sides
from sdpo_lightning.types import Stage

_MARKS = {
    "prompt_cut": "with their prompt cut from the left",
    "completion_cut": "with a completion cut at its end",
    "prompt_merged": "whose prompt's last token merges with the completion",
}


def source_lines(
    source: Sides, store: PairStore, dropped: Mapping[str, int], marks: Mapping[str, int]
) -> list[Finding]:
    """What became of the rows of one source.

    Args:
        source: its name and the ids of its pairs.
        store: knows their lengths.
        dropped: reason -> rows.
        marks: what happened to kept pairs -> how many.
    """
    ids = [*source.train_ids, *source.val_ids]
    lost = sum(dropped.values())
    total, named = len(ids) + lost, f"source {source.name!r}"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    kept = f"{named}: {total} rows, {len(source.train_ids)} pairs to train on, {len(source.val_ids)} held out"
    lines = [Finding("info", f"{kept}, {lost} dropped ({_share(lost, total)}){f': {reasons}' if lost else ''}")]
    lines.append(Finding("info", f"{named}: tokens p50/p95/max: {length_line(store.lengths(ids))}"))
    for mark, words in _MARKS.items():
        # Held-out files count theirs under names of their own.
        if count := marks.get(mark, 0) + marks.get(f"val_{mark}", 0):
            lines.append(Finding("info", f"{named}: {count} pairs ({_share(count, len(ids))}) {words}"))
    for mark in sorted({mark.removeprefix("val_") for mark in marks}):
        if mark.startswith("unrendered_"):
            count, what = marks.get(mark, 0) + marks.get(f"val_{mark}", 0), mark.removeprefix("unrendered_")
            lines.append(Finding("warning", f"{named}: of {count} pairs the chat template leaves out {what}"))
    if lost > 0.01 * total:
        lines.append(Finding("warning", f"{named}: {lost} of {total} rows dropped ({_share(lost, total)}): {reasons}"))
    return lines


def _share(count: int, total: int) -> str:
    return f"{100 * count / max(1, total):.1f} %"


def stage_lines(stages: Sequence[Stage], ordered: bool) -> list[Finding]:
    """The plan.

    Args:
        stages: of the run.
        ordered: whether their order is known before M_0 has ranked the sources.
    """
    found = [] if ordered else [Finding("info", "the order of the stages is M_0's to decide; here as given")]
    for row in (stage.row() for stage in stages):
        steps = f"{row['pairs']} pairs, {row['epochs']} epochs, {row['steps']} optimizer steps"
        own = "".join(f", {key} {value:g}" if isinstance(value, float) else f", {key} {value}"
                      for key, value in row["settings"].items())
        found.append(Finding("info", f"stage {row['index']} {row['name']!r}: {steps}{own}"))
    return found


def pair_lines(tokenizer: PreTrainedTokenizerBase, title: str, pair: TokenizedPair) -> list[str]:
    """A pair as text; what the loss sees stands between >> and <<, words of others in a completion outside.

    Args:
        tokenizer: of the data.
        title: says which pair it is.
        pair: its ids.
    """
    lines = [title, f"  prompt ({len(pair.prompt_ids)} tokens): {tokenizer.decode(pair.prompt_ids)!r}"]
    sides = (("chosen", pair.chosen_ids, pair.chosen_unscored), ("rejected", pair.rejected_ids, pair.rejected_unscored))
    for name, ids, unscored in sides:
        text, place = "", 0
        for begin, end in (*unscored, (len(ids), len(ids))):
            text += f">>{_shown(tokenizer, ids[place:begin])}<<{_shown(tokenizer, ids[begin:end])}"
            place = end
        lines.append(f"  {name} ({len(ids)} tokens): {text}")
    return lines


def _shown(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return repr(tokenizer.decode(ids))[1:-1]
