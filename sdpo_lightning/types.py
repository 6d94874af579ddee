"""Rank 0: the records that cross module borders, and the errors that cross the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # The errors are needed by verbs that start without torch.
    import torch
    from torch import Tensor


class ConfigurationError(ValueError):
    """The user's configuration or data is wrong. The command line exits with 2.

    The message says what was found, what was expected and which setting to change.
    """


class ResumeError(ValueError):
    """A resume or a cache is refused. The command line exits with 3."""


class SelfCheckError(RuntimeError):
    """The policy or the reference is not M_{t-1} at the first step of stage t. Exits with 1."""


# Of frozen weights; see `quantization.py`.
QuantizationName = Literal["nf4", "int8"]
# Shape of the learning rate within a stage; see `schedules.py`.
ScheduleName = Literal["constant", "linear", "cosine"]
# (start, end, prefix_start, prefix_end) of each segment of a packed row; see `attention.py`.
Segments = tuple[tuple[int, int, int, int], ...]


@dataclass(eq=False)
class PreferenceBatch:
    """One micro-batch of B preference pairs, in one form for every layout.

    The model runs on R rows of L tokens. The hidden state at flat position `source_index[n]` of the
    R * L positions predicts `target_ids[n]`, whose log-probability belongs to sequence
    `sequence_index[n]`. Sequences 0..B-1 are the chosen completions, B..2B-1 the rejected ones.

    Attributes:
        input_ids: `[R, L]` int64.
        position_ids: `[R, L]` int64.
        attention_mask: `[R, L]` int64, 1 for a real token; None for packed rows.
        source_index: `[N]` int64, flat position in `[R * L]` that predicts each completion token.
        target_ids: `[N]` int64, the completion tokens of all 2B sequences.
        sequence_index: `[N]` int64 in 0..2B-1.
        completion_lengths: `[2B]` int64, tokens that count in each completion.
        pair_id: `[B]` int64, unique over all sources.
        weights: `[B]` float32, of the pairs in the mean over a step, where they add up to `step_pairs`; 0 marks a
            filler pair, which no loss and no metric counts.
        step_pairs: real pairs of this optimizer step, over all ranks and micro-batches.
        num_tokens: real tokens that the model runs on.
        segments: of the packed row (R = 1); None for padded rows.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    source_index: Tensor
    target_ids: Tensor
    sequence_index: Tensor
    completion_lengths: Tensor
    pair_id: Tensor
    weights: Tensor
    step_pairs: int
    num_tokens: int
    segments: Segments | None = None

    @property
    def num_pairs(self) -> int:
        """B, filler pairs included."""
        return self.pair_id.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        """A copy with every tensor on `device`."""
        import torch

        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()})


@dataclass(eq=False)
class PairLogps:
    """Log-probabilities of the completions of B pairs, summed over tokens (nats).

    Attributes:
        chosen: `[B]` float32.
        rejected: `[B]` float32.
        chosen_lengths: `[B]` int64, completion tokens.
        rejected_lengths: `[B]` int64.
        pair_weights: `[B]` optional factors on the losses of the pairs, without gradient (WPO).
        real: `[B]` optional bool, False for a filler pair, which losses over several pairs leave out.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    pair_weights: Tensor | None = None
    real: Tensor | None = None

    def detach(self) -> PairLogps:
        """The same numbers without their graph."""
        return replace(self, chosen=self.chosen.detach(), rejected=self.rejected.detach())

    @property
    def gamma(self) -> Tensor:
        """`[B]` log pi(y_w | x) - log pi(y_l | x), the paper's log-ratio (below Eq. 1)."""
        return self.chosen - self.rejected


@dataclass(frozen=True, eq=False)
class LogpTable:
    """Logps of many pairs, looked up by pair id. The rows are sorted by id.

    Attributes:
        pair_id: `[P]` int64, ascending, on the CPU.
        chosen: `[P]` float32, summed logps.
        rejected: `[P]` float32.
        chosen_lengths: `[P]` int64, completion tokens.
        rejected_lengths: `[P]` int64.
    """

    pair_id: Tensor
    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @classmethod
    def build(cls, pair_id: Tensor, logps: PairLogps) -> LogpTable:
        """Sort by id; of a pair that was scored twice, one row is kept."""
        order = pair_id.argsort(stable=True)
        ids = pair_id[order]
        keep = ids != ids.roll(1)
        keep[:1] = True
        order = order[keep]
        columns = (logps.chosen, logps.rejected, logps.chosen_lengths, logps.rejected_lengths)
        return cls(pair_id[order], *(column[order] for column in columns))

    def positions(self, pair_id: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the given ids.

        Args:
            pair_id: `[B]` int64, on the CPU.

        Returns:
            `[B]` row numbers (any row where unknown) and `[B]` bool, True where the id is known.
        """
        import torch

        if not len(self.pair_id):
            return torch.zeros_like(pair_id), torch.zeros_like(pair_id, dtype=torch.bool)
        rows = torch.searchsorted(self.pair_id, pair_id).clamp_(max=len(self.pair_id) - 1)
        return rows, self.pair_id[rows] == pair_id

    def lookup(self, pair_id: Tensor) -> tuple[PairLogps, Tensor]:
        """Logps of the given ids, on the device of `pair_id`.

        Args:
            pair_id: `[B]` int64.

        Returns:
            `PairLogps` of `[B]`, meaningless where unknown, and `[B]` bool, True where known.
        """
        rows, known = self.positions(pair_id.cpu())
        columns = (self.chosen, self.rejected, self.chosen_lengths, self.rejected_lengths)
        moved = (column[rows].to(pair_id.device) for column in columns)
        return PairLogps(*moved), known.to(pair_id.device)


@dataclass(frozen=True)
class Chunk:
    """D_t, the pairs that one stage trains on.

    Attributes:
        name: becomes the stage's name and part of a folder name.
        pair_ids: ids in training order before any shuffle.
    """

    name: str
    pair_ids: Sequence[int]


@dataclass(frozen=True)
class StageSettings:
    """What a stage has in place of the run's own setting; None is the run's own.

    Attributes:
        lr: learning rate of every group of parameters (`model.optimizer`).
        beta: `model.beta`.
        label_smoothing: `model.label_smoothing`.
        warmup_ratio: `model.warmup_ratio`.
        lr_scheduler: `model.lr_scheduler`.
        epochs: passes over the chunk (`data.epochs_per_stage`).
        batch_size: pairs per rank and micro-batch (`data.batch_size`).
    """

    lr: float | None = None
    beta: float | None = None
    label_smoothing: float | None = None
    warmup_ratio: float | None = None
    lr_scheduler: ScheduleName | None = None
    epochs: int | None = None
    batch_size: int | None = None

    def given(self) -> dict[str, float | int | str]:
        """Those that aren't the run's own."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Stage:
    """Training on one chunk.

    Attributes:
        index: from 1, the paper's t.
        name: the chunk's name.
        pair_ids: ids in file order, source after source.
        epoch_steps: optimizer steps of each pass over the chunk.
        first_epoch: the Trainer's `current_epoch` at which the stage begins.
        settings: those that the stage has to itself.
    """

    index: int
    name: str
    pair_ids: Sequence[int]
    epoch_steps: tuple[int, ...]
    first_epoch: int
    settings: StageSettings = StageSettings()

    @property
    def epochs(self) -> int:
        """Passes over the chunk."""
        return len(self.epoch_steps)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return sum(self.epoch_steps)

    @property
    def folder_name(self) -> str:
        """Name of M_t's folder, as in `02-pandalm`."""
        return f"{self.index:02d}-{self.name}"

    def row(self) -> dict[str, Any]:
        """A row of `curriculum.json`."""
        return {
            "index": self.index,
            "name": self.name,
            "pairs": len(self.pair_ids),
            "epochs": self.epochs,
            "steps": self.num_steps,
            "settings": self.settings.given(),
        }


@dataclass(frozen=True, eq=False)
class ReferenceInputs:
    """What a reference may need at the start of a stage.

    Attributes:
        batches: each pair of the chunk and each held-out pair once, in any order, this rank's share.
        rows_digest: gives the sha256 over their tokenised rows in file order; slow, so only where needed.
        policy_digest: sha256 of the weights that the reference takes over, the recorded M_{t-1}.
        folder: where caches are kept, in the run directory.
        numerics: precision, layout and the function that gives logps: other ones give other last digits, or more.
        known: logps of M_0 where they were computed for the ranking; None from stage 2 on.
    """

    batches: Iterable[PreferenceBatch]
    rows_digest: Callable[[], str]
    policy_digest: str
    folder: Path
    numerics: str = ""
    known: LogpTable | None = None


@dataclass(frozen=True)
class RunFacts:
    """What a reference may look at before any weights are loaded.

    Attributes:
        sharded: whether models are cut over the ranks.
        adapters: whether adapters are trained, and the reference can be one.
        tokenizer: of the data.
        needs_own_lengths: whether loss or logps use lengths of completions or single tokens.
        rows_cut: source -> pairs that `data.max_length` has cut.
    """

    sharded: bool
    adapters: bool
    tokenizer: Any
    needs_own_lengths: bool
    rows_cut: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class ExternalInputs:
    """What a reference that is no M_t may need before the policy is loaded.

    Attributes:
        load: name or folder of a model and its quantisation -> the model, on its device and perhaps sharded.
        score: `model, batch -> PairLogps` without gradients, in the run's precision.
        pairs: name of a tokenizer and its length limit -> all pairs that are trained on or held out, in padded rows
            of its ids and once each. None, None: as the policy sees them.
    """

    load: Callable[[str, QuantizationName | None], torch.nn.Module]
    score: Callable[[torch.nn.Module, PreferenceBatch], PairLogps]
    pairs: Callable[[str | None, int | None], ReferenceInputs]


@dataclass(frozen=True)
class ExternalModel:
    """A model that is no M_t.

    Attributes:
        name: absolute path of its folder, or its hub name.
        digest: sha256 of its weights.
    """

    name: str
    digest: str


@dataclass
class StageRecord:
    """Which stage was entered, and the weights that each one began with. Saved in checkpoints.

    Attributes:
        entered: index of the stage whose first step was prepared last; 0 before the first.
        reference: index t of the M_t that the reference was when the stage began; -1: an external model.
        digests: t -> sha256 of M_t's weights.
        folders: t -> folder of M_t, relative to the run directory; M_0 has none. -1 -> folder or hub name.
    """

    entered: int = 0
    reference: int = 0
    digests: dict[int, str] = field(default_factory=dict)
    folders: dict[int, str] = field(default_factory=dict)
