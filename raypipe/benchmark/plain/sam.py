"""SAM's automatic mask generator in its plainest form: every candidate becomes a mask at the crop's size at once.

The order of work is that of the official generator: a batch of prompts is up-sampled, filtered, pasted into the image
and run-length encoded mask by mask, before anything is suppressed. Only the network is ours too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from itertools import product

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, in_turns, segment

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB in 0..255 (official code)
EDGE = 20  # px from a crop's edge at which a mask counts as cut off (official code)


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """The official generator's own points, without crops: a point of GloPER's 21 crops costs the same."""
    method = copy(method)
    method.points_per_side, method.crop_n_layers, method.result = 32, 0, "masks"
    arms = [lambda image: segment(method, [image])[0], lambda image: masks(method, image)]
    seconds, found = in_turns(arms, images[:1], repeats)  # the plain one takes minutes
    least = [agreement(*pair) for pair in zip(*found, strict=True)]
    against = f"{device}; 32 x 32 points; all candidates up-sampled, float32"
    return [
        *compared("sam", seconds, against),
        Figure("sam", "masks per image", "", [float(len(masks)) for masks in found[0]]),
        Figure("sam", "least best IoU with plain masks", "", least, "of any mask, both ways"),
    ]


def generate(method, image: np.ndarray) -> list[dict]:
    """All masks of an image by a loaded `sam` method's network and settings, without cleaning of small regions.

    image: RGB uint8 (H, W, 3). Returns dicts of rle, box (XYXY px, maxima inclusive), score, stability, point and crop.
    """
    import torch

    boxes = crop_boxes(image.shape[:2], layers=method.crop_n_layers, overlap_ratio=method.crop_overlap_ratio)
    with torch.inference_mode():
        found = [record for crop, layer in boxes for record in in_crop(method, image, crop, layer)]
    if len(boxes) == 1 or not found:
        return found
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (record["crop"] for record in found)]
    return suppressed(found, [1 / area for area in areas], method.crop_nms_thresh)


def masks(method, image: np.ndarray) -> np.ndarray:
    """The masks of `generate` alone: bool (N, H, W)."""
    from pycocotools import mask as coco

    found = [coco.decode(record["rle"]) for record in generate(method, image)]
    return np.array(found, bool).reshape(-1, *image.shape[:2])


def agreement(ours: np.ndarray, others: np.ndarray) -> float:
    """The least best IoU that any mask has with the other set's, both ways; 1 for two empty sets. bool (N, H, W)."""
    if not len(ours) or not len(others):
        return float(len(ours) == len(others))
    a, b = (found.reshape(len(found), -1).astype(np.float32) for found in (ours, others))
    shared = a @ b.T
    overlap = shared / (a.sum(1)[:, None] + b.sum(1) - shared)  # (N, M) IoU
    return float(min(overlap.max(0).min(), overlap.max(1).min()))


def crop_boxes(size: tuple[int, int], *, layers: int, overlap_ratio: float) -> list[tuple[list[int], int]]:
    """Pairs of an XYXY box, right and bottom exclusive, and its layer. Crops of less than 2 px a side are left out."""
    height, width = size
    found = [([0, 0, width, height], 0)]
    for layer in range(1, layers + 1):
        n = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / n))
        w, h = (int(math.ceil((overlap * (n - 1) + side) / n)) for side in (width, height))
        for i, j in product(range(n), range(n)):
            x0, y0 = (w - overlap) * i, (h - overlap) * j
            x1, y1 = min(x0 + w, width), min(y0 + h, height)
            if x1 - x0 >= 2 and y1 - y0 >= 2:
                found.append(([x0, y0, x1, y1], layer))
    return found


def in_crop(method, image: np.ndarray, crop: list[int], layer: int) -> list[dict]:
    """The masks of one crop, best predicted IoU first."""
    import torch
    from PIL import Image

    network = method._network
    side, device = network.config.vision_config.image_size, network.device
    part = Image.fromarray(image[crop[1] : crop[3], crop[0] : crop[2]])
    scale = side / max(part.size)
    width, height = (max(1, int(length * scale + 0.5)) for length in part.size)
    resized = np.array(part.resize((width, height), Image.Resampling.BILINEAR))
    mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
    pixels = (torch.from_numpy(resized).to(device) - mean) / std
    pixels = torch.nn.functional.pad(pixels.permute(2, 0, 1), (0, side - width, 0, side - height))
    features = network.get_image_embeddings(pixels[None])
    n = int(method.points_per_side / method.crop_n_points_downscale_factor**layer)
    line = [(1 + 2 * i) / (2 * n) for i in range(n)]
    points = np.array([(x * part.width, y * part.height) for y in line for x in line])
    found = []
    for start in range(0, len(points), method.points_per_batch):
        batch = points[start : start + method.points_per_batch]
        found += in_batch(method, features, batch, (height, width), crop, image.shape[:2])
    return suppressed(found, [record["score"] for record in found], method.box_nms_thresh)


def in_batch(method, features, points: np.ndarray, resized: tuple[int, int], crop: list[int], size) -> list[dict]:
    """The masks that some points prompt, up-sampled first and then filtered.

    points: (P, 2), (x, y) px in the crop. resized: (height, width) of the crop in the network's input. size: image's.
    """
    import torch
    import torch.nn.functional as F
    from pycocotools import mask as coco

    network, (x0, y0, x1, y1) = method._network, crop
    scaled = points * (resized[1] / (x1 - x0), resized[0] / (y1 - y0))
    out = network(
        image_embeddings=features,
        input_points=torch.from_numpy(scaled).to(features.device)[None, :, None],
        input_labels=torch.ones(1, len(points), 1, dtype=torch.int64, device=features.device),
        multimask_output=True,
    )
    side = network.config.vision_config.image_size
    logits = F.interpolate(out.pred_masks[0], (side, side), mode="bilinear", align_corners=False)
    logits = logits[..., : resized[0], : resized[1]]
    logits = F.interpolate(logits, (y1 - y0, x1 - x0), mode="bilinear", align_corners=False).flatten(0, 1)
    scores = out.iou_scores.flatten()
    good = scores > method.pred_iou_thresh
    logits, scores, points = logits[good], scores[good], points.repeat(3, 0)[good.cpu().numpy()]
    offset = method.stability_score_offset
    inner, outer = ((logits > limit).sum(-1, dtype=torch.int32).sum(-1) for limit in (offset, -offset))
    found = []
    columns = (logits > 0).cpu().numpy(), scores.tolist(), (inner / outer).tolist(), points
    for mask, score, stability, point in zip(*columns, strict=True):
        y, x = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        box = [int(x[0]) + x0, int(y[0]) + y0, int(x[-1]) + x0, int(y[-1]) + y0] if len(x) else [x0, y0, x0, y0]
        if not stability >= method.stability_score_thresh or is_cut_off(box, crop, size):
            continue
        pasted = np.zeros(size, np.uint8, order="F")
        pasted[y0:y1, x0:x1] = mask
        prompt = {"box": box, "point": (point[0] + x0, point[1] + y0), "crop": crop}
        found.append({"rle": coco.encode(pasted), "score": score, "stability": stability, **prompt})
    return found


def is_cut_off(box: list[int], crop: list[int], size: tuple[int, int]) -> bool:
    """Whether any side of a box is near that side of the crop and not near that side of the image."""
    sides = zip(box, crop, (0, 0, size[1], size[0]), strict=True)
    return any(abs(own - edge) <= EDGE < abs(own - border) for own, edge, border in sides)


def suppressed(records: list[dict], scores: list[float], threshold: float) -> list[dict]:
    """Greedy non-maximum suppression on the boxes: what stays, best first."""
    import torch
    from torchvision.ops import nms

    if not records:
        return []
    boxes = torch.tensor([record["box"] for record in records], dtype=torch.float32)
    return [records[i] for i in nms(boxes, torch.tensor(scores), threshold)]
