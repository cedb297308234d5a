"""The scores of named segments by a loop over thresholds, classes and segments, each over all pixels of the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import process_time

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, ratios
from raypipe.evaluation.tasks import _naming_scores
from raypipe.evaluation.tasks.naming import TABLE
from raypipe.masks import decode_rle, encode_segments

SIZE, SEGMENTS, CLASSES = (375, 500), 15, 59  # an image of PASCAL
TAU_IOU = 0.5
NAMES = ("union", "best", "recall", "area", "precision")


def compare(_subject, _device: str, _images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """On made images, from the stored run lengths to the scores of tables 6 and 7, 19 thresholds; CPU seconds."""
    thresholds = [np.array(TABLE[kind]) for kind in ("tt", "st")]
    arms: list[Callable] = [
        lambda *image: quick(*image, thresholds),
        lambda *image: [plain(*decoded(*image), each) for each in thresholds],
        lambda *image: quick(*image, [thresholds[0][5:6], thresholds[1][2:3]]),  # the headline's
    ]
    seconds, found = [[] for _ in arms], [[] for _ in arms]
    for seed in range(2 * repeats):
        image = made(seed)
        for times, kept, arm in zip(seconds, found, arms, strict=True):
            start = process_time()
            kept.append(arm(*image))
            times.append(process_time() - start)
    pairs = zip(found[0], found[1], strict=True)
    differences = [largest(ours, other) for each in pairs for ours, other in zip(*each, strict=True)]
    case = f"{len(thresholds[0]) + len(thresholds[1])} thresholds, {SEGMENTS} segments, {CLASSES} classes; CPU time"
    return [
        *compared("naming_evaluation", seconds[:2], f"a loop over thresholds, classes and segments; {case}"),
        Figure(
            "naming_evaluation",
            "cost of all thresholds over that of one of each table",
            "x",
            ratios(seconds[0], seconds[2]),
        ),
        Figure("naming_evaluation", "largest difference from plain", "", differences),
    ]


def made(seed: int) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """Stored segments that cover an image, its label, and similarities (S, C): blocks whose edges do not meet."""
    rng = np.random.default_rng(seed)

    def blocks(values: np.ndarray, side: int) -> np.ndarray:
        return np.kron(values, np.ones((side, side), int))[: SIZE[0], : SIZE[1]]

    number = blocks(rng.integers(0, SEGMENTS, (12, 16)), 32)
    label = blocks(rng.choice([-1, 0, *rng.integers(1, CLASSES + 1, 6)], (10, 14)), 38).astype(np.int32)
    masks = np.stack([number == i for i in range(SEGMENTS)])
    similarity = rng.uniform(-0.1, 0.6, (SEGMENTS, CLASSES))
    similarity[:, label.max() - 1] += rng.random(SEGMENTS) * 0.5  # some are right
    return encode_segments(masks), label, similarity


def quick(segments: list[dict], label: np.ndarray, similarity: np.ndarray, thresholds: Sequence[np.ndarray]) -> list:
    """Ours: the pixels are counted once for all thresholds."""
    found = _naming_scores.overlaps(segments, label)
    areas = np.array([each["area"] for each in segments], float)
    how = {"at": 0, "tau_iou": TAU_IOU, "open_ground": True}
    numbers = np.arange(similarity.shape[1]) + 1
    every = (_naming_scores.scores(found, similarity, numbers, areas, each, **how) for each in thresholds)
    return [{name: getattr(each, name) for name in NAMES} for each in every]


def decoded(segments: list[dict], label: np.ndarray, similarity: np.ndarray) -> tuple:
    """What `plain` takes: masks instead of run lengths."""
    return np.stack([decode_rle(each) for each in segments]), label, similarity


def plain(
    masks: np.ndarray, label: np.ndarray, similarity: np.ndarray, thresholds: np.ndarray, *, open_ground: bool = True
) -> dict[str, np.ndarray]:
    """NAMES at each threshold: (T,), NaN where there is no measure.

    masks: bool (S, H, W). label: int (H, W), -1 = ignored, 0 = no class. similarity: (S, C), of classes 1, 2, ...
    """
    found = {name: [] for name in NAMES}
    for threshold in thresholds:
        assigned = [int(row.argmax()) + 1 if row.max() >= threshold else 0 for row in similarity]
        present = [number for number in np.unique(label).tolist() if number > 0]
        unions, bests, reached, right = [], [], [], []
        for number in sorted({*present, *assigned} - {0}):
            its = [i for i, each in enumerate(assigned) if each == number]
            true = label == number
            ious = [overlap(masks[i], true, label, open_ground) for i in its]
            unions.append(overlap(masks[its].any(0), true, label, open_ground) if its else 0.0)
            order = sorted(range(len(its)), key=lambda j: (-similarity[its[j]].max(), -masks[its[j]].sum()))  # noqa: B023
            bests.append(ious[order[0]] if its else 0.0)
            reached.append(np.max(ious) if its else -1.0)
            right += [iou >= TAU_IOU for iou in ious]
        reached = np.array(reached)
        curve = [np.mean(reached >= i / 100) for i in range(101)] if len(reached) else [np.nan]
        found["union"].append(mean(unions))
        found["best"].append(mean(bests))
        found["recall"].append(mean(reached >= TAU_IOU))
        found["area"].append(np.trapezoid(curve, dx=0.01) if len(reached) else np.nan)
        found["precision"].append(mean(right))
    return {name: np.array(values) for name, values in found.items()}


def overlap(mask: np.ndarray, true: np.ndarray, label: np.ndarray, open_ground: bool) -> float:
    """IoU without ignored pixels, and for a class that is not there without those of no class; NaN for 0 / 0."""
    mask = mask & (label != -1)
    if open_ground and not true.any():
        mask = mask & (label != 0)
    either = np.count_nonzero(mask | true)
    return np.count_nonzero(mask & true) / either if either else np.nan


def mean(values: Sequence[float]) -> float:
    """Without NaN; NaN where there is nothing else."""
    known = [float(value) for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else np.nan


def largest(ours: dict, other: dict) -> float:
    """The largest difference; NaN of both is none."""
    pairs = [(np.nan_to_num(ours[name], nan=-1), np.nan_to_num(other[name], nan=-1)) for name in NAMES]
    return float(max(np.abs(one - two).max() for one, two in pairs))
