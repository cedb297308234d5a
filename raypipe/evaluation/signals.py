"""What tells, without a label, whether a mask is good: signals of single masks; of all, higher is better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SIDE = 512  # px of an image's longer side at which its edges and colours are compared with masks
BLUR = 1.0  # px, the Gaussian's standard deviation: grain and the blocks of JPEG are no edges
SHIFT = 0.1  # of a threshold, up and down
SQUARINGS = 10  # of a matrix: 1024 rounds of the power iteration


def agreements(images: Sequence[dict], methods: Sequence[str], *, polarity: str = "fixed") -> list[np.ndarray]:
    """For each run of an image, how far its masks agree with those of the others: float64 (N,) each, N >= 1.

    That is the mean Dice of a mask with the mask of another run that meets it best, over the other runs by their
    weights. A run's weight is how central its first mask is on this image, the entry of the leading eigenvector of the
    matrix of these agreements, so that a mask counts by how far the others agree with it; and it is shared among the
    runs of one method, whose settings make the same errors. images: two or more rows of `measured.EVERY_MASK` of one
    size, of different runs. methods: of each. polarity: as of `matches`.
    """
    count = len(images)
    found = [
        [matches(one, other, polarity=polarity) if one is not other else None for other in images] for one in images
    ]
    first = np.array([[0.0 if its is None else its[0] for its in row] for row in found])
    shared = np.array([1 / sum(each == other for other in methods) for each in methods])
    power = (first + first.T) * shared
    power = power / (power.max() or 1) + np.eye(count)  # its largest eigenvalue alone is so large
    for _ in range(SQUARINGS):
        power = power @ power
        power /= power.sum()
    weights = power.sum(1) * shared
    others = [[j for j in range(count) if j != i] for i in range(count)]
    return [np.average([found[i][j] for j in its], axis=0, weights=weights[its]) for i, its in enumerate(others)]


def matches(one: dict, other: dict, *, polarity: str = "fixed") -> np.ndarray:
    """For each mask of an image the Dice with the mask of another run that meets it best: float64 (N,), N >= 1.

    one, other: rows of `measured.EVERY_MASK` of one size; a run that found nothing counts as one empty mask, and two
    empty masks agree. polarity: with "best" a mask of the other may stand for what it leaves of both foregrounds, as in
    `agree`. Works on the run lengths: no mask is decoded.
    """
    from pycocotools import mask as coco

    size = [one["height"], one["width"]]
    first, second = (rles(each["masks"], size) for each in (one, other))
    areas, others = (np.atleast_1d(coco.area(each)).astype(np.float64) for each in (first, second))
    iou = np.asarray(coco.iou(first, second, [0] * len(second))).reshape(len(first), len(second))
    together = areas[:, None] + others[None, :]
    shared = np.rint(np.where(together > 0, iou * together / (1 + iou), 0))
    found = dices(shared, together)
    if polarity == "best":  # of both foregrounds, in which all masks lie
        left = union([one["foreground"], other["foreground"]], size) - others[None, :]
        found = np.maximum(found, dices(areas[:, None] - shared, areas[:, None] + left))
    return found.max(1)


def dices(shared: np.ndarray, together: np.ndarray) -> np.ndarray:
    """Dice of pairs of masks, 1 where both are empty. shared: pixels of both. together: the sum of their areas."""
    return np.where(together > 0, 2 * shared / np.maximum(together, 1), 1.0)


def against(row: dict, label: np.ndarray, *, polarity: str = "fixed") -> np.ndarray:
    """The Dice of each mask of a row with a label: float64 (N,), N >= 1. row: of `measured.EVERY_MASK`.

    label: bool (H, W), of the image's size. polarity: with "best" the better one of a mask and what it leaves of the
    foreground counts; the task `pattern` takes the best one of all masks, which is more where there are three.
    """
    from pycocotools import mask as coco

    size = [row["height"], row["width"]]
    target = coco.encode(np.asfortranarray(label, dtype=np.uint8))
    masks = rles(row["masks"], size)
    wanted, areas = float(coco.area(target)), np.atleast_1d(coco.area(masks)).astype(np.float64)
    shared = np.array([coco.area(coco.merge([mask, target], intersect=True)) for mask in masks], np.float64)
    found = dices(shared, areas + wanted)
    if polarity == "best":
        inside, within = union([row["foreground"]], size), wanted
        if row["foreground"] is not None:
            within = float(coco.area(coco.merge([*rles([row["foreground"]], size), target], intersect=True)))
        found = np.maximum(found, dices(within - shared, inside - areas + wanted))
    return found


def rles(masks: Sequence[str], size: Sequence[int]) -> list[dict]:
    """Masks as COCO's library takes them; an empty one where there is none."""
    from pycocotools import mask as coco

    found = [{"size": size, "counts": counts.encode()} for counts in masks]
    return found or [coco.encode(np.zeros(size, np.uint8, order="F"))]


def union(foregrounds: Sequence[str | None], size: Sequence[int]) -> float:
    """The pixels of all foregrounds; None = the whole image."""
    from pycocotools import mask as coco

    if None in foregrounds:
        return float(size[0] * size[1])
    return float(coco.area(coco.merge([{"size": size, "counts": each.encode()} for each in foregrounds])))


def steadiness(soft: np.ndarray, threshold: float) -> float:
    """IoU of the masks at a threshold SHIFT higher and lower; NaN where both are empty. soft: (H, W) in [0, 1]."""
    lower = np.count_nonzero(soft > threshold - SHIFT)
    return np.count_nonzero(soft > threshold + SHIFT) / lower if lower else np.nan


class Picture:
    """A photograph, by which its masks are judged."""

    def __init__(self, image: np.ndarray):
        """image: RGB uint8 (H, W, 3)."""
        import cv2

        height, width = image.shape[:2]
        scale = min(1.0, SIDE / max(height, width))
        self.size = (max(1, round(width * scale)), max(1, round(height * scale)))  # as OpenCV has it
        image = cv2.resize(image, self.size, interpolation=cv2.INTER_AREA)
        smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), BLUR)
        slopes = (cv2.Sobel(smooth, cv2.CV_32F, *axes, ksize=3) for axes in ((1, 0), (0, 1)))
        strength = np.sqrt(sum(slope**2 for slope in slopes).max(2))  # of the channel with the strongest edge
        bounds = np.quantile(strength, np.arange(1, 256) / 256)
        self._levels = np.searchsorted(bounds, strength).astype(np.uint8)  # of the gradient, about as many pixels each
        self._colours = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).astype(np.float64)

    def edges(self, mask: np.ndarray, foreground: np.ndarray) -> float:
        """How far the image's edges lie on a mask's contour, in 0..1: 0.5 = no more than anywhere else.

        The probability that the gradient is stronger in a pixel at the contour than in another one, ties half. mask,
        foreground: bool (H, W), at any size; only pixels of the foreground count, and the contour between mask and
        foreground. A mask without a contour there, empty or full, has no support: 0. NaN where nothing is left beside.
        """
        import cv2

        mask, foreground = self._small(mask, foreground)
        rest, near = foreground & ~mask, np.ones((3, 3), np.uint8)
        grown, shrunk = (cv2.dilate(each.view(np.uint8), near).view(bool) for each in (mask, rest))
        band = (grown & rest) | (shrunk & mask)
        at, away = (np.bincount(self._levels[pixels], minlength=256) for pixels in (band, foreground & ~band))
        if not at.any():
            return 0.0
        return float(at @ (np.cumsum(away) - away / 2) / (at.sum() * away.sum())) if away.any() else np.nan

    def contrast(self, mask: np.ndarray, foreground: np.ndarray) -> float:
        """The share of the variance of the foreground's colours (CIELAB) that lies between mask and rest, in 0..1.

        mask, foreground: as of `edges`. 0 for a mask that is empty or full. NaN in a foreground of one colour.
        """
        mask, foreground = self._small(mask, foreground)
        inside = self._colours[foreground]
        inside = inside - inside.mean(0) if len(inside) else inside
        total, is_mask = (inside**2).sum(), mask[foreground]
        count = np.count_nonzero(is_mask)
        if not total > 1e-6 * len(inside):
            return np.nan
        if not 0 < count < len(inside):
            return 0.0
        of_mask = inside[is_mask].sum(0)  # the rest's is its negative: they are about the mean
        return float((of_mask**2).sum() * (1 / count + 1 / (len(inside) - count)) / total)

    def _small(self, mask: np.ndarray, foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both at the working size; the mask within the foreground."""
        import cv2

        near = (
            cv2.resize(each.view(np.uint8), self.size, interpolation=cv2.INTER_NEAREST) for each in (mask, foreground)
        )
        mask, foreground = (each.view(bool) for each in near)
        return mask & foreground, foreground
