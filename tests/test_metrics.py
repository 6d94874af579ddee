"""PreferenceMetrics against plain numpy means over the pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdpo_lightning.metrics import PreferenceMetrics
from sdpo_lightning.types import PairLogps

BETA = 0.1
PLAIN = set(PreferenceMetrics.KEYS) | {"pairs"}
M0 = {f"rewards_m0/{tail}" for tail in ("chosen", "rejected", "margins", "accuracies")}


class Pairs:
    """Random logps of some pairs under policy, reference and M_0."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        # fp32 values, so that the metric and numpy start from the same numbers.
        draw = -90 * generator.random((6, count), dtype=np.float32)
        self.policy, self.reference, self.m0 = draw[:2], draw[2:4], draw[4:]
        self.losses = generator.random(count, dtype=np.float32)
        self.lengths = generator.integers(1, 30, (2, count))
        self.weights = np.ones(count, dtype=np.float32)
        self.known = np.ones(count, dtype=bool)

    def _logps(self, table: np.ndarray, part: slice) -> PairLogps:
        chosen, rejected = (torch.from_numpy(side[part].copy()) for side in table)
        return PairLogps(chosen, rejected, *(torch.from_numpy(side[part].copy()) for side in self.lengths))

    def update(self, metric: PreferenceMetrics, part: slice = slice(None), m0: bool = False) -> None:
        """Give one micro-batch to the metric."""
        given = [self._logps(table, part) for table in (self.policy, self.reference, self.m0)]
        metric.update(
            torch.from_numpy(self.losses[part].copy()),
            given[0],
            given[1],
            torch.from_numpy(self.weights[part].copy()),
            BETA,
            given[2] if m0 else None,
            torch.from_numpy(self.known[part].copy()) if m0 else None,
        )

    def expected(self) -> dict[str, float]:
        """Means in fp64 over the pairs of weight 1."""
        real = self.weights > 0
        (w, lo), (ref_w, ref_lo), (m0_w, m0_lo) = (
            table.astype(np.float64) for table in (self.policy, self.reference, self.m0)
        )
        gamma = w - lo
        values = {
            "loss": self.losses,
            "rewards/chosen": BETA * (w - ref_w),
            "rewards/rejected": BETA * (lo - ref_lo),
            "rewards/margins": BETA * (w - ref_w) - BETA * (lo - ref_lo),
            "rewards/accuracies": (w - ref_w > lo - ref_lo).astype(float),
            "logps/chosen": w,
            "logps/rejected": lo,
            "logps_per_token/chosen": (w - ref_w) / self.lengths[0],
            "logps_per_token/rejected": (lo - ref_lo) / self.lengths[1],
            "gamma": gamma,
            "gamma_ref": ref_w - ref_lo,
            "accuracies_gamma": (np.sign(gamma) + 1) / 2,
        }
        means = {key: np.mean(value[real], dtype=np.float64) for key, value in values.items()}
        known = real & self.known
        if known.any():
            m0 = {
                "chosen": BETA * (w - m0_w),
                "rejected": BETA * (lo - m0_lo),
                "margins": BETA * (w - m0_w) - BETA * (lo - m0_lo),
                "accuracies": (w - m0_w > lo - m0_lo).astype(float),
            }
            means |= {f"rewards_m0/{tail}": np.mean(value[known]) for tail, value in m0.items()}
        return means | {"pairs": float(real.sum())}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, float], keys: set[str]) -> None:
    assert set(found) == keys
    for key in keys:
        # Differences of fp32 numbers up to 90: 90 * 2^-24 = 5e-6 at most, before the mean.
        assert found[key].item() == pytest.approx(expected[key], rel=1e-6, abs=1e-5), key


def test_means_equal_numpy():
    pairs, metric = Pairs(37), PreferenceMetrics()
    pairs.update(metric, m0=True)
    assert_equal(metric.compute(), pairs.expected(), PLAIN | M0)


def test_by_hand():
    metric, lengths = PreferenceMetrics(), torch.tensor([2, 4])
    policy = PairLogps(torch.tensor([-4.0, -8.0]), torch.tensor([-6.0, -8.0]), lengths, lengths)
    reference = PairLogps(torch.tensor([-5.0, -6.0]), torch.tensor([-5.0, -12.0]), lengths, lengths)
    metric.update(torch.tensor([0.5, 1.0]), policy, reference, torch.ones(2), 0.5)
    found = {key: value.item() for key, value in metric.compute().items()}
    expected = {
        "loss": (0.5 + 1.0) / 2,
        "rewards/chosen": 0.5 * (1 - 2) / 2,
        "rewards/rejected": 0.5 * (-1 + 4) / 2,
        "rewards/margins": (0.5 * (1 + 1) + 0.5 * (-2 - 4)) / 2,
        "rewards/accuracies": 0.5,  # 0.5 > -0.5 is right, -1 > 2 is wrong
        "logps/chosen": -6.0,
        "logps/rejected": -7.0,
        "logps_per_token/chosen": (1 / 2 - 2 / 4) / 2,
        "logps_per_token/rejected": (-1 / 2 + 4 / 4) / 2,
        "gamma": (2 + 0) / 2,
        "gamma_ref": (0 + 6) / 2,
        "accuracies_gamma": (1 + 0.5) / 2,  # gamma 2 wins, gamma 0 ties
        "pairs": 2.0,
    }
    assert found == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("cuts", [[10, 11, 13, 30], [1], [36], list(range(1, 37))])
def test_micro_batches_of_unequal_size_combine_exactly(cuts):
    pairs, metric, whole = Pairs(37), PreferenceMetrics(), PreferenceMetrics()
    for start, end in zip([0, *cuts], [*cuts, 37], strict=True):
        pairs.update(metric, slice(start, end), m0=True)
    pairs.update(whole, m0=True)
    found, expected = metric.compute(), whole.compute()
    assert set(found) == set(expected)
    for key in found:
        # Sums are kept in fp64, so the cuts leave no trace beyond the order of fp64 additions.
        assert found[key].item() == pytest.approx(expected[key].item(), rel=1e-12, abs=1e-12), key


def test_filler_pairs_leave_no_trace():
    pairs, clean, metric = Pairs(8), PreferenceMetrics(), PreferenceMetrics()
    pairs.update(clean, slice(0, 5), m0=True)
    pairs.weights[5:] = 0.0
    for table in (pairs.policy, pairs.reference, pairs.m0):
        table[:, 5], table[:, 6] = np.nan, -np.inf
    pairs.losses[5:7] = np.nan, np.inf
    pairs.update(metric, m0=True)
    # A micro-batch of fillers only.
    pairs.update(metric, slice(5, 8), m0=True)
    found, expected = metric.compute(), clean.compute()
    assert found["pairs"].item() == 5
    assert {key: value.item() for key, value in found.items()} == {k: v.item() for k, v in expected.items()}


def test_nan_of_a_real_pair_shows():
    pairs, metric = Pairs(4), PreferenceMetrics()
    pairs.losses[2] = np.nan
    pairs.update(metric)
    assert metric.compute()["loss"].isnan()
    assert not metric.compute()["rewards/margins"].isnan()


def test_m0_keys_count_known_pairs_only():
    pairs, metric = Pairs(9), PreferenceMetrics()
    pairs.known[3:] = False
    # What a lookup of unknown ids holds is meaningless.
    pairs.m0[:, 3:] = np.nan
    pairs.update(metric, m0=True)
    assert_equal(metric.compute(), pairs.expected(), PLAIN | M0)
    # A filler pair counts no more for being known.
    pairs.weights[2], pairs.known[2] = 0.0, True
    metric.reset()
    pairs.update(metric, m0=True)
    assert metric.count_m0.item() == 2
    assert_equal(metric.compute(), pairs.expected(), PLAIN | M0)


def test_m0_keys_are_left_out_without_known_pairs():
    pairs, metric = Pairs(4), PreferenceMetrics()
    pairs.update(metric)
    assert set(metric.compute()) == PLAIN
    pairs.known[:] = False
    pairs.update(metric, m0=True)
    assert set(metric.compute()) == PLAIN
    assert metric.compute()["pairs"].item() == 8


def test_ties():
    metric, lengths = PreferenceMetrics(), torch.ones(4, dtype=torch.long)
    chosen, rejected = torch.tensor([-5.0, -5.0, -1.0, -2.0]), torch.tensor([-5.0, -5.0, -2.0, -1.0])
    policy = PairLogps(chosen, rejected, lengths, lengths)
    known = torch.ones(4, dtype=torch.bool)
    metric.update(torch.zeros(4), policy, policy, torch.ones(4), BETA, policy, known)
    found = metric.compute()
    # Policy = reference: every reward is 0 and no tie counts, as in TRL.
    assert found["rewards/accuracies"].item() == 0.0
    assert found["rewards_m0/accuracies"].item() == 0.0
    # gamma 0, 0, 1, -1: (1/2 + 1/2 + 1 + 0) / 4
    assert found["accuracies_gamma"].item() == 0.5


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_forgets_everything():
    first, second, metric = Pairs(6, seed=1), Pairs(3, seed=2), PreferenceMetrics()
    first.update(metric, m0=True)
    metric.reset()
    assert {key: value.item() for key, value in metric.compute().items()} == {"pairs": 0.0}
    second.update(metric, m0=True)
    assert_equal(metric.compute(), second.expected(), PLAIN | M0)


def test_no_pair_gives_no_mean():
    pairs, metric = Pairs(2), PreferenceMetrics()
    pairs.weights[:] = 0.0
    pairs.update(metric, m0=True)
    assert set(metric.compute()) == {"pairs"}


def test_states_are_sums_over_ranks():
    """What `dist_reduce_fx` does on two processes: add the states of both."""
    pairs, left, right, both = Pairs(11), PreferenceMetrics(), PreferenceMetrics(), PreferenceMetrics()
    pairs.known[8:] = False
    pairs.update(left, slice(0, 4), m0=True)
    pairs.update(right, slice(4, 11), m0=True)
    for name, reduce in both._reductions.items():
        setattr(both, name, reduce(torch.stack([getattr(left, name), getattr(right, name)])))
    both._update_count = 1
    assert_equal(both.compute(), pairs.expected(), PLAIN | M0)
