"""Spectral cluster voting in the plainest form: the whole matrix, one decomposition per number, votes on pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import THUMBNAIL, with_features

PATCHES = 20  # a side: 1600 nodes; the dense matrix of a photograph of 1024 px would take minutes and 2 GB


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """At a small size, in full batches, against one image at a time on the CPU."""
    import cv2

    def plain(image: np.ndarray, features) -> np.ndarray:
        options = {name: getattr(method, name) for name in ("ks", "upsampling", "seed")}
        found = [candidates(each, image.shape[:2], **options) for each in (features, *features.others)]
        return voted(np.concatenate(found))[0][None]

    side = PATCHES * next(iter(method.features([images[0][:THUMBNAIL, :THUMBNAIL]]))).patch
    images = [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images]
    against = f"{side} px a side; a dense matrix, scipy's eigh for each number of clusters, votes on pixels"
    return with_features(method, device, images, repeats, plain=plain, against=against)


def candidates(features, size: tuple[int, int], *, ks: Sequence[int], upsampling: int, seed: int) -> np.ndarray:
    """All clusters of one backbone's features as masks: bool (M, H, W)."""
    from scipy.cluster.vq import kmeans2
    from scipy.linalg import eigh
    from torch.nn.functional import interpolate

    picture = features.patches.T.reshape(1, -1, *features.grid)
    grid = tuple(upsampling * side for side in features.grid)
    picture = interpolate(picture, size=grid, mode="bilinear", align_corners=True)
    nodes = picture[0].flatten(1).T.cpu().numpy().astype(np.float64)
    nodes /= np.linalg.norm(nodes, axis=1, keepdims=True)
    affinity = nodes @ nodes.T
    affinity = (affinity - affinity.min()) / (affinity.max() - affinity.min())
    degree = np.diag(affinity.sum(1))
    found = []
    for k in ks:
        _, vectors = eigh(degree - affinity, degree, subset_by_index=[0, k - 1])
        tries = (kmeans2(vectors, k, iter=300, minit="++", rng=np.random.default_rng(seed + i)) for i in range(10))
        _, labels = min(tries, key=lambda pair: ((vectors - pair[0][pair[1]]) ** 2).sum())
        side = features.patch // upsampling
        pixels = labels.reshape(grid).repeat(side, 0).repeat(side, 1)
        seen = pixels[: features.seen[0], : features.seen[1]]
        at_size = tuple(np.arange(length) * other // length for length, other in zip(size, seen.shape, strict=True))
        order = dict.fromkeys(labels.tolist())  # as they are first met: votes may tie
        found += [seen[np.ix_(*at_size)] == label for label in order]
    return np.array(found)


def voted(masks: np.ndarray, *, remove_long: bool = True) -> tuple[np.ndarray, int]:
    """The mask of bool (M, H, W) that overlaps most with all that may vote, and its index."""

    def is_long(mask: np.ndarray) -> bool:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        return any(lines[0] == 0 and lines[-1] == len(all_) - 1 for lines, all_ in ((rows, mask), (columns, mask.T)))

    kept = [i for i, mask in enumerate(masks) if mask.any() and not (remove_long and is_long(mask))]
    kept = kept or list(range(len(masks)))
    scores = [sum((masks[i] & masks[j]).sum() / max(1, (masks[i] | masks[j]).sum()) for j in kept) for i in kept]
    best = kept[int(np.argmax(scores))]
    return masks[best], best
