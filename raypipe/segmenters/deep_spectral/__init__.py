"""Deep Spectral Methods: eigenvectors of a graph of features and colours (Melas-Kyriazi et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from raypipe import masks, spectral
from raypipe.segmenters._clusters import MOST, cluster
from raypipe.segmenters._discovery import Discovery, by_grid
from raypipe.segmenters.deep_spectral import graph
from raypipe.types import Segments

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.features.grid import Features

FEW = 3  # eigenvectors of a cut: the constant, its own, and the one whose gap to it is told. As many cells are too few
FLAT = 1e-6  # range of likenesses up to which all cells are alike: float32 rounding
AT_ONCE = 1 << 26  # likenesses in memory: 256 MB, or those of one image


@dataclass
class DeepSpectral(Discovery):
    """One mask: the smaller side of the cut through the graph of an image's patches; or its regions, one mask each.

    With `--result segments` the masks are the regions besides the background, which is what none of them covers. The
    score of a mask is the gap behind the cut's eigenvalue: near 0 (note `ambiguous_cut`) another cut is as good. Notes:
    `degenerate`, the image has one colour or all patches are alike: nothing stands out, a box is the whole image;
    `few_patches`, three or fewer: the whole image.
    """

    # Defaults are the reference's for objects, those of regions included.

    # mask: all of the smaller side; box: its largest part, whose bounding box is the paper's box; segments: regions
    result: Literal["mask", "box", "segments"] = "mask"
    regions: int = 4  # clusters of cells, the background among them; 0 = as many as the eigenvalues' largest gap says
    eigenvectors: int = 5  # that regions are clustered by, the constant included; 5 to 20 are worth a sweep
    cut: Literal["zero", "mean"] = "zero"  # the object is where the eigenvector is above
    lapnorm: bool = True  # normalised Laplacian
    color_lambda: float = 0.0  # weight of colours beside features; 1 and 10 are worth a sweep
    color_matrix: Literal["knn", "rw"] = "knn"  # colours: nearest neighbours, or a random walk to the next cells
    downsample: int | None = None  # px of a cell of the graph; None = of a patch

    source = "Melas-Kyriazi et al., CVPR 2022"
    licence = "Apache-2.0 (weights)"
    needs = (
        "facebook/dino-vits16, 0.1 GB: fetched on the first run, or by `raypipe weights deep_spectral`; or "
        "`--weights color`"
    )
    stages = {
        "features": (
            *("result", "regions", "eigenvectors", "cut", "lapnorm", "color_lambda", "color_matrix", "downsample"),
            "seed",
        )
    }

    FIT = "crop"

    @property
    def random(self) -> bool:
        """Whether clusters are looked for."""
        return self.result == "segments"

    def untiled(self) -> str:
        reason = "whose regions of one tile are not those of another; leave out --result segments"
        return reason if self.result == "segments" else super().untiled()

    def __post_init__(self):
        super().__post_init__()
        if self.regions != 0 and not 2 <= self.regions <= MOST:
            raise ValueError(f"deep_spectral: regions must be 0 or from 2 to {MOST}, got {self.regions!r}")
        if self.eigenvectors < 3:
            raise ValueError(f"deep_spectral: eigenvectors must be at least 3, got {self.eigenvectors!r}")
        if not 0 <= self.color_lambda < np.inf:
            raise ValueError(f"deep_spectral: color_lambda must not be negative, got {self.color_lambda!r}")
        if self.downsample is not None and self.downsample < 1:
            raise ValueError(f"deep_spectral: downsample must be at least 1, got {self.downsample!r}")
        for field, other, needed in (
            ("regions", self.result != "segments", "result segments"),
            ("eigenvectors", self.result != "segments", "result segments"),
            ("cut", self.result != "mask", "result mask"),
            ("color_matrix", self.color_lambda == 0, "color_lambda above 0"),
        ):
            if other and getattr(self, field) != type(self).__dataclass_fields__[field].default:
                raise ValueError(f"deep_spectral: {field} {getattr(self, field)!r} has an effect only with {needed}")

    def find(self, images: Sequence[np.ndarray], features: Sequence[Features]) -> Iterator[Segments]:
        solved = {}
        for group in by_grid(features, lambda each: AT_ONCE // np.prod(self._cells(each)) ** 2):
            found = self._solve([images[i] for i in group], [features[i] for i in group])
            solved |= zip(group, found, strict=True)
        for i, (image, each) in enumerate(zip(images, features, strict=True)):
            yield self._segments(solved[i], each, image.shape[:2])

    def _cells(self, features: Features) -> tuple[int, int]:
        """The grid (h, w) of the graph's nodes."""
        return tuple(max(1, side * features.patch // self._side(features)) for side in features.grid)

    def _side(self, features: Features) -> int:
        """Of a cell, in px of the image as the network saw it."""
        return self.downsample or features.patch

    def _solve(self, images: Sequence[np.ndarray], features: Sequence[Features]) -> list[Solution | None]:
        """The eigenvectors of each image, all of them with features on one grid. None for too few cells."""
        import torch

        cells = self._cells(features[0])
        if cells[0] * cells[1] <= FEW:
            return [None] * len(images)
        alike = graph.likeness(torch.stack([each.patches for each in features]), features[0].grid, cells)
        is_flat = alike.amax((1, 2)) - alike.amin((1, 2)) <= FLAT
        degree, product = alike.sum(2).double(), spectral.dense(alike)
        if self.color_lambda:
            smalls = [graph.small(image, cells) for image in images]
            degree, product = self._with_colours(smalls, degree, product)
            is_flat &= torch.tensor([not np.ptp(each, axis=(0, 1)).any() for each in smalls], device=is_flat.device)
        degree = degree.where(degree >= graph.FEWEST, 1)
        count = self.eigenvectors if self.result == "segments" else FEW
        values, vectors = spectral.smallest_eigenpairs(product, degree, count, normalised=self.lapnorm)
        values = values / (1 if self.lapnorm else degree.mean(1, keepdim=True))  # so that gaps are comparable
        vectors = graph.constant_first(values, vectors, degree if self.lapnorm else torch.ones_like(degree))
        vectors = spectral.minority_positive(vectors).unflatten(2, cells)
        found = (tensor.cpu().numpy() for tensor in (values, vectors, is_flat))
        return [Solution(*each) for each in zip(*found, strict=True)]

    def _with_colours(self, smalls: Sequence[np.ndarray], degree: Tensor, product: Callable) -> tuple[Tensor, Callable]:
        """Degrees (B, n) and the product with the matrix, with the likeness of colours added. smalls: (h, w, 3)."""
        edges = {"knn": graph.nearest_colours, "rw": graph.random_walk}[self.color_matrix]
        matrix = graph.matrix([edges(small, str(degree.device)) for small in smalls], degree.shape[1])

        def colours(vectors):  # (B, n, any)
            return self.color_lambda * (matrix @ vectors.flatten(0, 1).float()).double().reshape(vectors.shape)

        # kept apart: the one is dense, the other has some 30 entries a row
        return degree + colours(degree.new_ones(*degree.shape, 1))[..., 0], lambda x: product(x) + colours(x)

    def _segments(self, solution: Solution | None, features: Features, size: tuple[int, int]) -> Segments:
        """What is found in an image of a size."""
        if solution is None or solution.is_flat:
            count = 0 if self.result == "segments" else 1
            found = np.full((count, *size), solution is None or self.result == "box")
            return Segments(found, note="degenerate" if solution else "few_patches")
        cut, gap = solution.vectors[1], float(solution.values[2] - solution.values[1])
        if self.result == "segments":
            numbers = split(solution, self.regions, self.seed)
            found = numbers == np.arange(1, numbers.max() + 1)[:, None, None]
        elif self.result == "box":
            found = boxed(cut > 0)[None]
        else:
            found = (cut > (cut.mean() if self.cut == "mean" else 0))[None]
        large = enlarged(found, features.seen, self._side(features), size, fill=self.result != "box")
        scores = () if self.result == "segments" else [gap]
        return Segments(large, scores=scores, note="ambiguous_cut" if gap < spectral.AMBIGUOUS else "")


@dataclass(frozen=True)
class Solution:
    """The smallest eigenpairs of one image's graph, the constant one first."""

    values: np.ndarray  # float64 (K,), K >= 3; of the plain Laplacian relative to the mean degree
    vectors: np.ndarray  # float64 (K, h, w), more of each negative than positive
    is_flat: bool  # all cells are alike, so that the vectors say nothing


def boxed(positive: np.ndarray) -> np.ndarray:
    """The largest 8-connected part of the smaller side of a cut, bool (h, w); all cells where there is none."""
    if 0.5 < positive.mean() < 1:
        positive = ~positive
    return masks.largest_component(positive, connectivity=8) if positive.any() else np.ones_like(positive)


def split(solution: Solution, regions: int, seed: int) -> np.ndarray:
    """Regions by k-means on the eigenvectors without the constant: int64 (h, w), 0 being the background.

    regions: how many; 0 = one more than there are eigenvalues before their largest gap, that behind the constant's left
    out. The background is the region with the most cells along the border, corners counted twice.
    """
    if not regions:
        regions = 2 + int(np.diff(solution.values)[1:].argmax())
    _, *vectors = solution.vectors
    labels = cluster(np.stack(vectors, 2).reshape(-1, len(vectors)), regions, seed=seed).reshape(vectors[0].shape)
    border = np.bincount(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    background = border.argmax()
    swapped = np.arange(labels.max() + 1)
    swapped[[0, background]] = background, 0
    return swapped[labels]


def enlarged(values: np.ndarray, seen: tuple[int, int], side: int, size: tuple[int, int], *, fill: bool) -> np.ndarray:
    """Masks of cells at an image's size: bool (N, H, W) of (N, h, w), each pixel as the cell it lies in.

    seen: (height, width) of the image as the network saw it. side: of a cell in it, in px. fill: what the crop to whole
    cells left out to the right and below is as in the masks stretched over all of the image, as the paper's code has
    it; else empty.
    """
    inside, stretched = [], []
    for axis in (0, 1):
        pixels = np.arange(size[axis]) * seen[axis] // size[axis]
        inside.append(pixels // side)
        stretched.append(pixels * values.shape[1 + axis] // seen[axis])
    (rows, columns), (height, width) = inside, values.shape[1:]
    is_inside = (rows < height)[:, None] & (columns < width)
    near = values[:, rows.clip(max=height - 1)[:, None], columns.clip(max=width - 1)]
    return np.where(is_inside, near, values[:, stretched[0][:, None], stretched[1]] & fill)


SEGMENTER = DeepSpectral
