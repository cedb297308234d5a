"""The parts of SAM's official automatic mask generator: crops, points, filters, suppression, small regions.

Kirillov et al., ICCV 2023, and its published code, whose integer rules are kept. Boxes of masks are XYXY px and, as
there, end with the last pixel inside them: a mask of one pixel has a box without width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

EDGE = 20  # px from a crop's edge at which a mask counts as cut off (official code)
SMALLEST_CROP = 2  # px a side; layers of crops degenerate on tiny images
# Pixels that are up-sampled at a time. In a CPU's cache one 1024 x 1024 mask takes half as long as in a batch of many.
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}


class Crop(NamedTuple):
    """A part of the image that the network sees as an image of its own: XYXY px, right and bottom exclusive."""

    x0: int
    y0: int
    x1: int
    y1: int
    layer: int  # 0 is the whole image; layer i has 2**i crops a side

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.y1 - self.y0, self.x1 - self.x0


class Candidates(NamedTuple):
    """Masks of one crop on their way through the filters, one entry of each tensor per mask."""

    logits: torch.Tensor  # (M, s, s) float32 at low resolution: the masks at full size would not fit into memory
    scores: torch.Tensor  # (M,) predicted IoU
    stability: torch.Tensor  # (M,) IoU of the masks at a higher and a lower threshold
    boxes: torch.Tensor  # (M, 4) int64 XYXY px in the crop, maxima inclusive
    points: torch.Tensor  # (M, 2) float64 (x, y) px in the crop


@dataclass(frozen=True)
class Record:
    """One mask of the image, kept as the bits inside its box."""

    bits: np.ndarray  # numpy.packbits of the mask inside the box
    box: tuple[int, int, int, int]  # XYXY px in the image, maxima inclusive; zeros for an empty mask
    area: int  # px
    score: float  # predicted IoU
    stability: float
    point: tuple[float, float]  # (x, y) px in the image: the prompt
    crop: Crop

    def paste(self, canvas: np.ndarray) -> np.ndarray:
        """Set the mask's pixels in a bool (H, W) array of the image's size, which is returned."""
        x0, y0, x1, y1 = self.box
        size = y1 - y0 + 1, x1 - x0 + 1
        canvas[y0 : y1 + 1, x0 : x1 + 1] |= np.unpackbits(self.bits, count=size[0] * size[1]).view(bool).reshape(size)
        return canvas


def crop_boxes(size: tuple[int, int], *, layers: int, overlap_ratio: float) -> list[Crop]:
    """The whole image, then the crops of layer 1, 2, ...: columns from left to right, each from top to bottom.

    size: (height, width) of the image. Crops with a side below SMALLEST_CROP px are left out.
    """
    height, width = size
    crops = [Crop(0, 0, width, height, 0)]
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / count))
        crop_height, crop_width = (math.ceil((overlap * (count - 1) + side) / count) for side in size)
        for column in range(count):
            for row in range(count):
                x0, y0 = (crop_width - overlap) * column, (crop_height - overlap) * row
                crop = Crop(x0, y0, min(x0 + crop_width, width), min(y0 + crop_height, height), layer)
                if min(crop.size) >= SMALLEST_CROP:
                    crops.append(crop)
    return crops


def point_grid(per_side: int) -> np.ndarray:
    """Points (per_side**2, 2) float64, (x, y) in 0..1, at the centres of a grid's cells; x runs fastest."""
    offset = 1 / (2 * per_side)
    line = np.linspace(offset, 1 - offset, per_side)
    return np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)


def upsample(
    logits: torch.Tensor, *, side: int, input_size: tuple[int, int], size: tuple[int, int]
) -> Iterator[torch.Tensor]:
    """Yield the logits at the crop's size, a few masks at a time: float32 (m, H, W).

    logits: (M, s, s) over the network's padded input of `side` px. input_size: (height, width) of it that is image.
    Both steps are bilinear. Low rows and columns that only the padding reads are cut off first, which changes nothing.
    """
    import torch.nn.functional as F

    factor = side // logits.shape[-1]
    low = [min(logits.shape[-1], math.ceil(length / factor) + 1) for length in input_size]
    count = max(1, CHUNK[logits.device.type] // max(side * side, size[0] * size[1]))
    for part in logits[:, None, : low[0], : low[1]].split(count):
        large = F.interpolate(part, scale_factor=float(factor), mode="bilinear", align_corners=False)
        large = large[..., : input_size[0], : input_size[1]]
        if size != input_size:
            large = F.interpolate(large, size, mode="bilinear", align_corners=False)
        yield large[:, 0]


def stability(logits: torch.Tensor, offset: float) -> torch.Tensor:
    """IoU of the masks at +offset and -offset: (M,) float32, not a number where both are empty. logits: (M, H, W)."""
    import torch

    inner, outer = (
        (logits > limit).sum(-1, dtype=torch.int32).sum(-1, dtype=torch.int32) for limit in (offset, -offset)
    )
    return inner / outer


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """XYXY of the pixels of masks, maxima inclusive: int64 (M, 4), zeros for an empty mask. masks: (M, H, W) bool."""
    import torch

    pixels = masks.view(torch.uint8)  # the maximum of bytes is much faster than `any`
    ends = []
    for line in (pixels.amax(1), pixels.amax(2)):  # columns, rows
        first, last = line.argmax(1), line.shape[1] - 1 - line.flip(1).argmax(1)
        ends.append((first, torch.where(line.amax(1) > 0, last, first)))
    return torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], 1)


def is_cut_off(boxes: torch.Tensor, crop: Crop, size: tuple[int, int]) -> torch.Tensor:
    """Whether masks end at an edge of the crop that is none of the image: bool (M,).

    boxes: (M, 4) in the crop. size: (height, width) of the image. An edge counts up to EDGE px, inclusive.
    """
    import torch

    boxes = boxes + torch.tensor([crop.x0, crop.y0, crop.x0, crop.y0], device=boxes.device)
    edges = torch.tensor([crop[:4], (0, 0, size[1], size[0])], device=boxes.device)
    near_crop, near_image = ((boxes - edge).abs() <= EDGE for edge in edges)
    return (near_crop & ~near_image).any(1)


def suppress(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression: indices of the boxes that stay, best score first, ties in the given order."""
    from torchvision.ops import nms

    return nms(boxes.float(), scores.float(), threshold)


def take(candidates: Candidates, index: torch.Tensor) -> Candidates:
    """Those masks that an index or a bool tensor selects."""
    return Candidates(*(column[index] for column in candidates))


def join(parts: Iterable[Candidates]) -> Candidates:
    """All masks of several batches, in order."""
    import torch

    return Candidates(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def records(candidates: Candidates, upsampled: Iterable[torch.Tensor], crop: Crop) -> list[Record]:
    """Masks of a crop as records of the image. upsampled: the candidates' logits at the crop's size, some at a time."""
    masks = (mask for part in upsampled for mask in (part > 0).cpu().numpy())
    columns = (column.tolist() for column in candidates[1:])
    return [
        Record(
            bits=cut(mask, box),
            box=(box[0] + crop.x0, box[1] + crop.y0, box[2] + crop.x0, box[3] + crop.y0),
            area=int(np.count_nonzero(mask)),
            score=score,
            stability=stable,
            point=(point[0] + crop.x0, point[1] + crop.y0),
            crop=crop,
        )
        for mask, score, stable, box, point in zip(masks, *columns, strict=True)
    ]


def cut(mask: np.ndarray, box: Iterable[int]) -> np.ndarray:
    """The bits of a bool (H, W) mask inside an XYXY box with inclusive maxima, as `Record` keeps them."""
    x0, y0, x1, y1 = box
    return np.packbits(mask[y0 : y1 + 1, x0 : x1 + 1])


def prefer_small_crops(records: list[Record], threshold: float) -> list[Record]:
    """Suppression between crops: masks of small crops win. The order becomes smallest crops first."""
    import torch

    if not records:
        return []
    areas = [math.prod(record.crop.size) for record in records]
    kept = suppress(torch.tensor([record.box for record in records]), 1 / torch.tensor(areas), threshold)
    return [records[i] for i in kept]


def remove_small_regions(mask: np.ndarray, min_area: int, kind: Literal["holes", "islands"]) -> tuple[np.ndarray, bool]:
    """Fill holes, or drop islands, of fewer than `min_area` px (8-connected): the mask and whether it changed.

    mask: (H, W) bool. If every island is small, the largest one stays.
    """
    import cv2

    inverted = kind == "holes"
    count, regions, stats, _ = cv2.connectedComponentsWithStats((mask ^ inverted).astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    small = areas < min_area
    small[0] = False  # what is not in a region
    if not small.any():
        return mask, False
    if inverted:
        kept = small
        kept[0] = True  # the mask itself
    else:
        kept = ~small
        kept[0] = False
        if not kept.any():
            kept[1 + areas[1:].argmax()] = True
    return kept[regions], True


def clean(records: list[Record], size: tuple[int, int], *, min_area: int, threshold: float) -> list[Record]:
    """Remove small holes and islands, then suppress doubles: unchanged masks win and come first.

    size: (height, width) of the image. Scores and stability stay those of the masks before.
    """
    import torch

    if not records:
        return []
    cleaned = [_cleaned(record, size, min_area) for record in records]
    unchanged = [float(new is old) for new, old in zip(cleaned, records, strict=True)]
    kept = suppress(torch.tensor([record.box for record in cleaned]), torch.tensor(unchanged), threshold)
    return [cleaned[i] for i in kept]


def _cleaned(record: Record, size: tuple[int, int], min_area: int) -> Record:
    """The record itself where nothing is to be removed."""
    import torch

    mask, filled = remove_small_regions(record.paste(np.zeros(size, bool)), min_area, "holes")
    mask, dropped = remove_small_regions(mask, min_area, "islands")
    if not filled and not dropped:
        return record
    box = tuple(mask_boxes(torch.from_numpy(mask)[None])[0].tolist())
    return replace(record, bits=cut(mask, box), box=box, area=int(mask.sum()))
