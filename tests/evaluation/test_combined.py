"""Ranks, and what each signal counts."""

import numpy as np
import pytest

from raypipe.evaluation.calibration import calibrated, rank_correlation, spearman
from raypipe.evaluation.combined import Ranks, loadings, slopes


def test_ranks_are_the_share_below_with_ties_half_and_by_group():
    values, groups = np.array([3.0, 1.0, 1.0, np.nan, 7.0]), np.array([0, 0, 0, 0, 1])
    ranks = Ranks(values, np.ones(5), groups)
    np.testing.assert_allclose(ranks(values, groups), [5 / 6, 1 / 3, 1 / 3, np.nan, 0.5])
    np.testing.assert_allclose(ranks(np.array([0.0, 9.0, 2.0]), np.array([0, 0, 2])), [0, 1, np.nan])
    heavy = Ranks(values, np.array([2.0, 1, 1, 1, 1]), groups)
    np.testing.assert_allclose(heavy(values, groups)[:3], [0.75, 0.25, 0.25])


def test_a_signal_counts_by_how_far_it_goes_along_with_the_first():
    rng = np.random.default_rng(0)
    quality, colour = rng.random((2, 500))
    noisy = [quality + rng.normal(0, scale, 500) for scale in (0.2, 0.2, 0.6)]
    values = np.column_stack(
        [*noisy, colour, colour + rng.normal(0, 0.01, 500), -quality, np.full((500, 2), [0.5, np.nan])]
    )
    values[rng.random(values.shape) < 0.2] = np.nan
    weights = loadings(values, np.ones(500))
    assert weights[0] > 0.3 and weights[1] > 0.3 and weights[1] > weights[2] > 0.1
    assert weights[3:5].max() < 0.1  # alike, but not like the first: nobody says that this is quality
    np.testing.assert_allclose(weights[5:], 0, atol=1e-9)
    assert weights.sum() == pytest.approx(1)
    alone = loadings(np.column_stack([np.full(500, np.nan), values[:, 1], values[:, 2]]), np.ones(500))
    assert alone[0] == 0 and alone[1] == pytest.approx(alone[2], abs=0.05)
    assert not loadings(np.full((3, 2), np.nan), np.ones(3)).any()


def test_a_methods_score_counts_as_far_as_it_goes_along_with_the_agreement_in_its_run():
    rng = np.random.default_rng(0)
    first, groups = rng.random(300), np.repeat([0, 1, 2], 100)
    score = np.where(groups == 0, first, np.where(groups == 1, -first, np.nan))
    found = slopes(score, first, np.ones(300), groups)
    assert found[0] == pytest.approx(1) and found[1] == 0
    assert slopes(score, np.full(300, np.nan), np.ones(300), groups)[0] == 1


def test_intervals_hold_their_share_whatever_the_errors_are():
    rng, held = np.random.default_rng(0), []
    for count in (10, 20, 30, 120):
        for _ in range(30 if count < 100 else 3):
            trust = rng.random(2 * count + 200)
            spread = 0.25 * (1.2 - trust) * rng.standard_t(3, len(trust))
            dice = np.clip(0.2 + 0.7 * trust + spread, 0, 1)
            images, runs = np.arange(len(trust)) % (count + 100), np.arange(len(trust)) // (count + 100)
            dice[runs == 1] = np.clip(dice[runs == 1] - 0.15, 0, 1)  # a run that is worse than its trust says
            known = images < count
            curves = calibrated(images[known], runs[known], trust[known], dice[known], 1)
            new = ~known & (runs == 1)
            low, high = (np.interp(trust[new], np.linspace(0, 1, 201), each) for each in (curves.low, curves.high))
            held.append(((low <= dice[new]) & (dice[new] <= high)).mean())
            assert 0 < curves.error < 0.4 and (np.diff(curves.dice) >= -1e-12).all()
    assert 0.87 < np.mean(held) < 0.97
    assert calibrated(np.arange(4), np.zeros(4, int), np.arange(4.0), np.arange(4.0), 0) is None


def test_a_rank_correlation_comes_with_what_other_images_would_have_given():
    rng = np.random.default_rng(0)
    trust = rng.random(40)
    found = rank_correlation(np.arange(40), trust, trust + rng.normal(0, 0.2, 40))
    assert found.low < found.value < found.high and found.high - found.low < 0.5
    twice = rank_correlation(np.arange(40) // 2, trust, trust**2)
    assert twice.value == pytest.approx(1) and twice.low == pytest.approx(1)
    assert rank_correlation(np.arange(2), trust[:2], trust[:2]) is None
    assert rank_correlation(np.arange(40), trust, np.ones(40)) is None


def test_rank_correlations_of_draws_are_those_of_rows_that_are_repeated():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    one, other = rng.integers(6, size=30) / 6, rng.random(30)
    times = rng.integers(3, size=(5, 30))
    rows = [np.repeat(np.arange(30), count) for count in times]
    np.testing.assert_allclose(spearman(one, other, times), [spearmanr(one[its], other[its])[0] for its in rows])
    assert np.isnan(spearman(np.ones(30), other, times)).all()
