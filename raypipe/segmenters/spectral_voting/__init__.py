"""Spectral clusters of features vote for the salient object: how SelfMask makes the masks that it learns from.

Shin, Albanie, Xie, "Unsupervised Salient Object Detection with Spectral Cluster Voting", CVPR Workshops 2022, section
3.2: nothing is trained. Here are the method and its clusters; `voting` is the choice among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypipe import networks, spectral
from raypipe.features import resnet
from raypipe.features.dino import Dino, Features
from raypipe.segmenters import _clusters
from raypipe.segmenters._discovery import COLOR, Discovery
from raypipe.segmenters.spectral_voting.voting import shared_cells, vote
from raypipe.types import Segments

if TYPE_CHECKING:
    from torch import Tensor

BACKBONES = ("weights", "weights_2", "weights_3")  # in the order of their candidates
FLAT = 1e-6  # least spread of cosines that makes a graph: below it is float32 rounding
AT_ONCE = 1 << 22  # cosines in memory: 16 MB


@dataclass(frozen=True)
class Joint(Features):
    """Features of the first backbone, with those of the others."""

    others: tuple[Features, ...] = ()


@dataclass
class SpectralVoting(Discovery):
    """One mask: of the clusters of an image's patches, the one that the others overlap with most.

    Candidates are the 2, 3 and 4 spectral clusters of each backbone's features that do not reach from one side of the
    image to the opposite one. The score is the sum of the winner's IoU with all of them: 1 where it is the only one,
    and the more the more agree. The paper votes with three backbones; with one the method runs as well. Notes:
    `no_candidate`, every cluster reaches from side to side, so that all vote; `few_patches`, not more than clusters are
    asked for, and `degenerate`, the image has one colour or its patches are all alike: the mask is empty.
    """

    weights: str = "facebook/dino-vits16"  # a Hugging Face id, URL, folder or file; color: features without weights
    weights_2: str | None = None  # a second backbone that votes, such as moco_v2_800ep_pretrain.pth.tar
    weights_3: str | None = None  # and a third, such as swav_800ep_pretrain.pth.tar
    ks: tuple[int, ...] = (2, 3, 4)  # numbers of clusters (paper); a sweep may try fewer
    upsampling: int = 2  # of the features, bilinear, before they are clustered (authors' configuration); 1 = none
    remove_long: bool = True  # clusters from side to opposite side are background (paper: framing prior)
    remove_small_large: bool = False  # so are those below 5 % of the image or with a box above 95 % (authors' code)

    source = "Shin, Albanie, Xie, CVPR Workshops 2022"
    licence = "Apache-2.0 (weights)"
    needs = (
        "facebook/dino-vits16, 0.1 GB: fetched on the first run, or by `raypipe weights spectral_voting`; "
        "or `--weights color`"
    )
    random = True
    stages = {"features": ("seed", "ks", "upsampling", "remove_long", "remove_small_large")}
    FACET, POSITIONS = "token_norm", "hf"  # the authors' copy of the network resamples as transformers does

    def __post_init__(self):
        self.ks = tuple(sorted(self.ks))
        if not self.ks or not 2 <= self.ks[0] <= self.ks[-1] <= _clusters.MOST or len(set(self.ks)) < len(self.ks):
            raise ValueError(f"spectral_voting: ks must be different numbers, 2 to {_clusters.MOST}, got {self.ks!r}")
        if self.upsampling not in (1, 2):
            raise ValueError(f"spectral_voting: upsampling must be 1 or 2, got {self.upsampling!r}")
        given = [getattr(self, field) for field in BACKBONES if getattr(self, field) is not None]
        if len(set(given)) < len(given):
            raise ValueError(f"spectral_voting: each backbone can vote once, got {', '.join(map(repr, given))}")
        if len(given) > 1:
            self.networks = tuple(field for field in BACKBONES if getattr(self, field) not in (None, COLOR))
        super().__post_init__()

    def load(self, device: str) -> None:
        networks.keep_products_exact(device)
        self._device, self._paths = device, networks.locate_each(self)
        given = [field for field in BACKBONES if getattr(self, field) is not None]
        self._backbones = [self.network(self._paths[each], device) if each in self._paths else None for each in given]

    def network(self, path: Path, device: str) -> Dino:
        if resnet.is_resnet(path, method=self.name):
            return resnet.Resnet(path, method=self.name, device=device, dtype=self.dtype)
        return super().network(path, device)

    def features(self, images: Sequence[np.ndarray]) -> Iterator[Joint]:
        of_each = (self.features_of(backbone, images) for backbone in self._backbones)
        for first, *others in zip(*of_each, strict=True):
            yield Joint(**vars(first), others=tuple(others))

    def find(self, images: Sequence[np.ndarray], features: Sequence[Joint]) -> Iterator[Segments]:
        for image, each in zip(images, features, strict=True):
            backbones = [each, *each.others]
            if min(len(one.patches) for one in backbones) <= self.ks[-1]:
                yield self.nothing(image, "few_patches")
            else:
                yield self._voted(image, backbones)

    def _voted(self, image: np.ndarray, backbones: Sequence[Features]) -> Segments:
        """The winner among the clusters of all backbones, on the cells that their grids share."""
        found = [self._clusters(features, image.shape[:2]) for features in backbones]
        found = [each for each in found if each.maps]
        if not found:
            return self.nothing(image, "degenerate")
        top, heights = shared_cells([each.rows for each in found])
        left, widths = shared_cells([each.columns for each in found])
        maps = [labels[each.rows[top][:, None], each.columns[left]] for each in found for labels in each.maps]
        masks = np.concatenate([labels == np.arange(labels.max() + 1)[:, None, None] for labels in maps])
        result = vote(masks, heights, widths, remove_long=self.remove_long, remove_small_large=self.remove_small_large)
        winner = masks[result.winner].repeat(heights, 0).repeat(widths, 1)
        note = "no_candidate" if result.all_filtered else ""
        return Segments(winner[None], scores=[float(result.scores.max())], note=note)

    def _clusters(self, features: Features, size: tuple[int, int]) -> Clusters:
        """Those of one backbone. size: (H, W) of the image."""
        import torch

        grid = tuple(self.upsampling * side for side in features.grid)
        with torch.inference_mode():
            vectors = coordinates(unit_nodes(features, grid), self.ks[-1])
        points = [] if vectors is None else [vectors[:, :k].cpu().numpy() for k in self.ks]
        maps = [_clusters.cluster(each, each.shape[1], seed=self.seed).reshape(grid) for each in points]
        cells = replace(features, grid=grid, patch=features.patch // self.upsampling)
        places = cells.enlarged(np.indices(grid), size)  # (2, H, W)
        return Clusters(maps, places[0, :, 0], places[1, 0])


@dataclass(frozen=True)
class Clusters:
    """Of the nodes of one backbone, and where these are in the image."""

    maps: list[np.ndarray]  # int (h, w), one for each number of clusters; none where all nodes are alike
    rows: np.ndarray  # (H,), the node's row at each px; columns (W,) alike
    columns: np.ndarray


def unit_nodes(features: Features, grid: tuple[int, int]) -> Tensor:
    """The nodes of the graph: features enlarged to a grid, corner on corner, of length 1. Float32 (n, D), row-major."""
    from torch.nn.functional import interpolate, normalize

    picture = features.patches.T.unflatten(1, features.grid)[None]  # (1, D, h, w)
    return normalize(interpolate(picture, size=grid, mode="bilinear", align_corners=True)[0].flatten(1).T, dim=1)


def coordinates(unit: Tensor, count: int) -> Tensor | None:
    """The lowest solutions of (D - A) y = lambda D y, the constant one first: float64 (n, count); None for equal nodes.

    unit: float32 (n, D), rows of length 1, or 0 as a residual network may give them: such a node can be like no other,
    and stands alone then. A is their cosines, stretched from least to greatest to 0..1. It has rank D + 1 at most, so
    that a product with it is two thin ones: the n x n matrix is never there. Only its least value takes all pairs.
    """
    least, greatest = least_cosine(unit), float(unit.any())
    if greatest - least <= FLAT:
        return None

    def product(vectors: Tensor) -> Tensor:
        """A times (1, n, b)."""
        single = vectors.float()
        return (unit @ (unit.T @ single) - least * single.sum(1, keepdim=True)) / (greatest - least)

    degree = product(unit.new_ones(1, len(unit), 1))[..., 0]
    degree = degree.where(degree > FLAT, 1)
    _, vectors = spectral.smallest_eigenpairs(product, degree, count)
    return vectors[0].T


def least_cosine(unit: Tensor) -> float:
    """The least product of any two rows of a float32 (n, D), some rows at a time, each pair once."""
    step = max(1, AT_ONCE // len(unit))
    return min(found.item() for found in [(unit[i : i + step] @ unit[i:].T).min() for i in range(0, len(unit), step)])


SEGMENTER = SpectralVoting
