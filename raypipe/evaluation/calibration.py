"""Trust to expected Dice by a few labels: a rising curve, an interval around it, and how far the two agree at all.

The interval is jackknife+ (Barber, Candes, Ramdas, Tibshirani, Annals of Statistics 2021): for an image like the
labelled ones the Dice lies in it with a probability of at least 1 - 2 * MISS, whatever the distribution, and of about
1 - MISS in practice. From FOLDS images on it is CV+ of the same paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MISS = 0.1  # share of images whose Dice may lie outside of the interval
FOLDS = 50  # groups of images, each of which is left out once; up to so many are left out one by one
FEWEST = 5  # labelled images below which no curve is drawn
GRID = np.linspace(0, 1, 201)  # of trust, between which curves are straight
DRAWS, AT_ONCE = 1000, 50  # of the bootstrap


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of trust with Dice, and where the middle 90 % of bootstrap draws lie."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curves:
    """The expected Dice of a run's masks by their trust, on GRID."""

    dice: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: float  # mean absolute difference of a labelled image's Dice from the curve without that image

    def __call__(self, trust: float) -> tuple[float, float, float]:
        """Expected Dice and interval of a mask."""
        return tuple(float(np.interp(trust, GRID, curve)) for curve in (self.dice, self.low, self.high))


def calibrated(images: np.ndarray, runs: np.ndarray, trust: np.ndarray, dice: np.ndarray, run: int) -> Curves | None:
    """The curves of one run; None where fewer than FEWEST images have a label.

    images, runs: int (N,), which image and run each labelled mask is of. trust, dice: float64 (N,). All runs shape the
    curve, which is isotonic regression; each is then moved by its own masks' mean distance from it, for a run may be
    wrong in a way that no other tells.
    """
    its = runs == run
    numbers = np.unique(images[its])
    if len(numbers) < FEWEST:
        return None
    fold = np.zeros(images.max() + 1, np.int64)
    fold[numbers] = np.arange(len(numbers)) % FOLDS
    lows, highs, errors = [], [], []
    for number in range(min(FOLDS, len(numbers))):
        left_out = np.isin(images, numbers[fold[numbers] == number])
        curve = _curve(trust[~left_out], dice[~left_out], its[~left_out])
        missed = np.abs(dice[left_out & its] - np.interp(trust[left_out & its], GRID, curve))
        lows += [curve - each for each in missed]
        highs += [curve + each for each in missed]
        errors += missed.tolist()
    last = int(np.floor(MISS * (len(errors) + 1))) - 1  # of so many images nothing is known: the interval is all
    low = np.sort(lows, axis=0)[last] if last >= 0 else np.zeros(len(GRID))
    high = np.sort(highs, axis=0)[len(errors) - 1 - last] if last >= 0 else np.ones(len(GRID))
    middle = _curve(trust, dice, its)
    return Curves(
        middle, np.clip(np.minimum(low, middle), 0, 1), np.clip(np.maximum(high, middle), 0, 1), np.mean(errors)
    )


def _curve(trust: np.ndarray, dice: np.ndarray, its: np.ndarray) -> np.ndarray:
    """The expected Dice on GRID: isotonic, straight between its steps' middles, moved to the masks of `its`."""
    from scipy.optimize import isotonic_regression

    order = np.lexsort((dice, trust))
    found = isotonic_regression(dice[order])
    starts = found.blocks[:-1]
    counts = np.diff(found.blocks)
    middles = np.add.reduceat(trust[order], starts) / counts
    heights = np.add.reduceat(dice[order], starts) / counts
    curve = np.interp(GRID, middles, heights)
    moved = (dice[its] - np.interp(trust[its], GRID, curve)).mean() if its.any() else 0.0
    return np.clip(curve + moved, 0, 1)


def rank_correlation(images: np.ndarray, trust: np.ndarray, dice: np.ndarray) -> Correlation | None:
    """How far trust orders masks as their Dice does. images: int (N,); whole images are drawn, with all their masks.

    None where there are too few, or one of the two is the same for all.
    """
    if len(np.unique(images)) < 3 or not trust.min() < trust.max() or not dice.min() < dice.max():
        return None
    numbers, inverse = np.unique(images, return_inverse=True)
    rng, draws = np.random.default_rng(0), []
    for _ in range(0, DRAWS, AT_ONCE):
        times = rng.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size=AT_ONCE)
        draws.append(spearman(trust, dice, times[:, inverse]))
    (value,) = spearman(trust, dice, np.ones((1, len(trust)))).tolist()
    return Correlation(value, *np.nanquantile(np.concatenate(draws), [0.05, 0.95]).tolist())


def spearman(one: np.ndarray, other: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Rank correlations of two columns (N,) in which each row stands so many `times`: float64 (B,) of whole (B, N).

    NaN where all rows have the same rank.
    """
    total = times.sum(1, keepdims=True)
    centred = []
    for values in (one, other):
        order = np.argsort(values, kind="stable")
        _, starts, group = np.unique(values[order], return_index=True, return_inverse=True)
        below = np.concatenate([np.zeros((len(times), 1)), np.cumsum(times[:, order], 1)], 1)
        ends = below[:, np.append(starts, len(values))]
        ranks = np.empty(times.shape)
        ranks[:, order] = ((ends[:, :-1] + ends[:, 1:]) / 2)[:, group]  # of ties the middle
        centred.append(ranks - (times * ranks).sum(1, keepdims=True) / total)
    shared, *own = ((times * a * b).sum(1) for a, b in (centred, centred[:1] * 2, centred[1:] * 2))
    scale = np.sqrt(own[0] * own[1])
    return np.divide(shared, scale, out=np.full(len(times), np.nan), where=scale > 0)
