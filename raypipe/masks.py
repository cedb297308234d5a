"""Masks as bytes and as table cells: COCO run lengths, boxes, 16-bit soft masks, and packing between processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

DAMAGED = "the run lengths of a mask do not decode, so its run is damaged; raypipe verify RUN --deep finds where"


class DamagedMask(RuntimeError):
    """A mask that was stored well cannot be decoded any more."""


def encode_rle(mask: np.ndarray) -> dict:
    """COCO run-length encoding of one mask. mask: (H, W) bool. Returns {"size": [H, W], "counts": ASCII text}."""
    rle = _encoded(mask)
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _encoded(mask: np.ndarray) -> dict:
    """COCO's own encoding of a mask (H, W). Of a large image with a small object most columns are only skimmed."""
    import cv2
    from pycocotools import mask as coco

    height, width = mask.shape
    used = np.flatnonzero(mask.any(0))
    first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
    is_wide = 2 * (end - first) > width
    part = mask if is_wide else mask[:, first:end]
    # OpenCV turns an array block by block, NumPy row by row: several times as long where a column leaves the cache
    columns = (
        cv2.transpose(part.astype(bool, copy=False).view(np.uint8)) if part.size else np.zeros((0, height), np.uint8)
    )
    if is_wide:
        return coco.encode(np.asfortranarray(columns.T))
    edges = np.flatnonzero(np.diff(columns.ravel(), prepend=0, append=0)) + first * height  # where runs begin and end
    counts = np.diff(edges, prepend=0, append=height * width)
    if len(counts) > 1 and not counts[-1]:
        counts = counts[:-1]
    return coco.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)


def decode_rle(rle: dict) -> np.ndarray:
    """The inverse of `encode_rle`: bool (H, W). Raises DamagedMask."""
    from pycocotools import mask as coco

    try:
        return coco.decode(_coco(rle)).astype(bool)
    except ValueError as error:
        raise DamagedMask(DAMAGED) from error


def areas(rles: Sequence[dict]) -> np.ndarray:
    """Pixels of each mask: int64 (N,)."""
    from pycocotools import mask as coco

    return np.array([coco.area(_coco(each)) for each in rles], np.int64)


def iou(rles: Sequence[dict], others: Sequence[dict]) -> np.ndarray:
    """IoU of each mask with each of the others, of one size: float64 (N, M); 1 where both are empty."""
    from pycocotools import mask as coco

    if not len(rles) or not len(others):
        return np.zeros((len(rles), len(others)))
    found = coco.iou([_coco(each) for each in rles], [_coco(each) for each in others], [False] * len(others))
    found[np.ix_(areas(rles) == 0, areas(others) == 0)] = 1
    return found


def _coco(rle: dict) -> dict:
    return {"size": list(rle["size"]), "counts": rle["counts"].encode("ascii")}


def runs(rles: Sequence[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs of set pixels of masks in column-major order, without decoding a pixel: three int64 (R,).

    Where each starts, where it ends (exclusive), and the index of its mask, ascending. rles: of `encode_rle`, of which
    COCO writes each length in digits of five bits, lowest first, from the fourth on as the difference from the last but
    one. Raises DamagedMask.
    """
    signs = np.frombuffer("".join(each["counts"] for each in rles).encode("ascii"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((signs & 32) == 0)  # of each number's digits, the one that has its sign
    first = np.append(0, last[:-1] + 1)[: len(last)]
    shift = 5 * (np.arange(len(signs)) - np.repeat(first, last - first + 1)) if len(last) else 0
    numbers = np.add.reduceat((signs & 31) << shift, first) if len(last) else signs
    numbers -= (signs[last] & 16) << shift[last] + 1 if len(last) else 0
    ends = np.searchsorted(last, np.cumsum([len(each["counts"]) for each in rles]))
    found = [[], [], []]
    for i, (start, end, each) in enumerate(zip([0, *ends], ends, rles, strict=False)):
        lengths = numbers[start:end]
        lengths[1::2], lengths[2::2] = lengths[1::2].cumsum(), lengths[2::2].cumsum()
        edges = lengths.cumsum()
        if not len(edges) or lengths.min() < 0 or edges[-1] != each["size"][0] * each["size"][1]:
            raise DamagedMask(DAMAGED)
        count = len(edges) // 2
        for kept, part in zip(found, (edges[: 2 * count : 2], edges[1::2], np.full(count, i)), strict=True):
            kept.append(part)
    return tuple(np.concatenate([np.zeros(0, np.int64), *each]) for each in found)


def encode_segments(
    masks: np.ndarray,
    *,
    labels: Sequence[str] = (),
    scores: Sequence[float] = (),
    soft: np.ndarray | None = None,
    embeddings: np.ndarray | None = None,
) -> list[dict]:
    """Rows of the `segments` column (`schema.SEGMENT`), in the order of the masks.

    masks: (N, H, W) bool. soft: (N, H, W) float32 in [0, 1], kept as 16-bit PNG, or None. embeddings: (N, D),
    kept as float16, or None. Boxes are [x, y, width, height] in pixels, all 0 for an empty mask. N = 0 gives [].
    """
    if not len(masks):
        return []
    from pycocotools import mask as coco

    rles = [_encoded(mask) for mask in masks]
    areas, boxes = [np.count_nonzero(mask) for mask in masks], coco.toBbox(rles)
    return [
        {
            "size": [int(side) for side in rle["size"]],
            "counts": rle["counts"].decode("ascii"),
            "bbox": [float(side) for side in boxes[i]],
            "area": int(areas[i]),
            "score": float(scores[i]) if len(scores) else None,
            "label": _whole(str(labels[i])) if len(labels) else None,
            "soft": None if soft is None else encode_soft(soft[i]),
            "embedding": None if embeddings is None else embeddings[i].astype(np.float16),
            "stability": None,
        }
        for i, rle in enumerate(rles)
    ]


def _whole(text: str) -> str:
    """A text with U+FFFD for half characters (lone surrogates), which no table can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def decode_segments(segments: Sequence[dict], size: tuple[int, int]) -> np.ndarray:
    """Masks of one row: bool (N, H, W). size: (height, width) of the image, used when N = 0."""
    if not len(segments):
        return np.zeros((0, *size), bool)
    return np.stack([decode_rle(segment) for segment in segments])


def encode_soft(soft: np.ndarray) -> bytes:
    """A probability map as 16-bit grey PNG. soft: (H, W) float in [0, 1]; the error is at most 1 / 131070."""
    import cv2

    return cv2.imencode(".png", np.rint(soft * 65535).astype(np.uint16))[1].tobytes()


def decode_soft(png: bytes) -> np.ndarray:
    """The inverse of `encode_soft`: float32 (H, W) in [0, 1]."""
    import cv2

    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED).astype(np.float32) / 65535


def largest_component(mask: np.ndarray, *, connectivity: Literal[4, 8] = 4) -> np.ndarray:
    """The connected part with the most pixels, of several the first in raster order. mask: (H, W) bool; so is it.

    connectivity: 8 = pixels that meet at a corner are connected too. An empty mask stays empty.
    """
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=connectivity)
    if count < 2:
        return mask.copy()
    areas = stats[1:, cv2.CC_STAT_AREA]
    largest = np.isin(labels, 1 + np.flatnonzero(areas == areas.max()))
    return labels == labels.flat[largest.argmax()]  # OpenCV numbers parts by an order of its own


def component_of(mask: np.ndarray, pixel: int) -> np.ndarray:
    """The 4-connected part that holds a pixel, bool (H, W); the pixel alone where it is not set. pixel: flat index."""
    import cv2

    if not mask.flat[pixel]:
        return (np.arange(mask.size) == pixel).reshape(mask.shape)
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    return labels == labels.flat[pixel]


def pack(masks: np.ndarray) -> bytes:
    """Masks as bytes between processes; bool costs one bit a pixel. masks: (N, H, W) bool or float32.

    Ray cannot join a block of bool tensors with one of float32, hence bytes and not tensors.
    """
    return np.packbits(masks).tobytes() if masks.dtype == bool else np.ascontiguousarray(masks, np.float32).tobytes()


def unpack(packed: bytes, shape: Sequence[int], *, soft: bool) -> np.ndarray:
    """The inverse of `pack`: (N, H, W), float32 if soft else bool."""
    if soft:
        return np.frombuffer(packed, np.float32).reshape(shape)
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=int(np.prod(shape))).astype(bool).reshape(shape)
