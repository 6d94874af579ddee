"""Rank 5: logps of M_0 -> scores of the pairs, and figures of each source for its report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo_lightning.data.curriculum import easy_to_hard, reward_accuracy
from sdpo_lightning.data.difficulty import (
    PairScores,
    difficulty_rewards,
    length_figures,
    length_sentence,
    mean_logps,
)
from sdpo_lightning.data.prepare import SourceReport
from sdpo_lightning.types import ConfigurationError, LogpTable, PairLogps

log = logging.getLogger(__name__)


def rank_sources(
    reports: Sequence[SourceReport],
    ids: Sequence[Sequence[int]],
    pair_scores: PairScores,
    m0: LogpTable,
    reference: LogpTable | None = None,
) -> dict[str, Tensor]:
    """Score the pairs, and fill in the reports.

    Args:
        reports: of all sources.
        ids: the pairs of each that are ranked.
        pair_scores: asked once, for the ranked pairs of all sources together.
        m0: logps of M_0.
        reference: of `data.difficulty_reference`; None is none.

    Returns:
        Source name -> `[P]` scores.

    Raises:
        ConfigurationError: logps that aren't finite, or a source without a pair that counts.
    """
    logps, known = m0.lookup(torch.tensor([i for part in ids for i in part]))
    assert bool(known.all()), "the ranking pass left pairs out"
    if reference is not None:
        theirs, known = reference.lookup(torch.tensor([i for part in ids for i in part]))
        assert bool(known.all()), "the pass of the reference left pairs out"
        logps = difficulty_rewards(logps, theirs)
    if not bool((logps.chosen.isfinite() & logps.rejected.isfinite()).all()):
        raise ConfigurationError(
            "M_0 gives a score that isn't finite; check `model.model_name_or_path` and `data.difficulty_reference`"
        )
    found, start = pair_scores(logps), 0
    scores = {}
    for report, part in zip(reports, ids, strict=True):
        own = scores[report.name] = found[start : start + len(part)]
        _fill(report, own, _slice(logps, start, start + len(part)))
        start += len(part)
    if sentence := order_of_length(reports):
        log.warning("%s", sentence)
    return scores


def _fill(report: SourceReport, scores: Tensor, logps: PairLogps) -> None:
    if bool(scores.isnan().all()):
        raise ConfigurationError(
            f"source {report.name!r}: `data.difficulty` counts none of its {len(scores)} ranked pairs; choose another "
            "one, or raise `data.rank_sample`"
        )
    report.reward_accuracy, report.standard_error = reward_accuracy(scores)
    report.mean_logps_accuracy, report.mean_logps_standard_error = reward_accuracy(mean_logps(logps))
    report.take_scores(vars(length_figures(logps)))


def _slice(logps: PairLogps, start: int, end: int) -> PairLogps:
    columns = (logps.chosen, logps.rejected, logps.chosen_lengths, logps.rejected_lengths)
    return PairLogps(*(column[start:end] for column in columns))


def order_of_length(reports: Sequence[SourceReport]) -> str:
    """What to say where M_0's order of the sources is that of length alone; else empty.

    Args:
        reports: of all sources.
    """
    accuracies = {r.name: r.reward_accuracy for r in reports if r.reward_accuracy is not None}
    if len(accuracies) < len(reports):
        return ""
    return length_sentence(easy_to_hard(accuracies), {report.name: report.shorter_chosen for report in reports})


# Heading, the key in `curriculum.json`, that of its standard error, width.
_COLUMNS = (
    ("accuracy of M_0 (se)", "reward_accuracy", "standard_error", 22),
    ("by mean logps (se)", "mean_logps_accuracy", "mean_logps_standard_error", 20),
    ("shorter chosen", "shorter_chosen", None, 15),
    ("of like length (n)", "length_matched_accuracy", "length_matched_pairs", 19),
    ("rank corr. with length", "length_correlation", None, 23),
)


def ranking_table(curriculum: Mapping[str, Any]) -> str:
    """The sources in training order with their scores, as text.

    Args:
        curriculum: what `curriculum.json` holds.
    """
    by_name = {source["name"]: source for source in curriculum["sources"]}
    lines = [f"{'source':24} {'pairs':>7}" + "".join(f" {title:>{width}}" for title, _, _, width in _COLUMNS)]
    for name in curriculum["order"]:
        row = by_name[name]
        cells = "".join(f" {_cell(row.get(key), row.get(beside)):>{width}}" for _, key, beside, width in _COLUMNS)
        lines.append(f"{name:24} {row['pairs']:7}{cells}")
    if curriculum.get("length_order"):
        lines.append(curriculum["length_order"])
    return "\n".join(lines)


def _cell(value: float | None, beside: float | None) -> str:
    if value is None:
        return "-"
    shown = "" if beside is None else f" ({beside})" if isinstance(beside, int) else f" ({beside:.3f})"
    return f"{value:.3f}{shown}"
