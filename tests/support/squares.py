"""The published protocol of validation as its description reads: a made data set, and a plain loop over its files."""

import json

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from raypipe.refiners.bilateral import Bilateral
from raypipe.refiners.guided import guided_filter
from support.layouts import MASKS

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
SIZES = [(60, 90), (90, 60), (64, 64), (50, 75), (101, 77), (48, 180), (70, 71), (90, 45), (60, 80), (80, 60), (33, 49)]


def made(root, sizes=SIZES, *, layout=MASKS["duts-te"][0]):
    """A data set: photographs of an ellipse on a ground of another colour, and masks with grey borders."""
    photos, masks = (root / each for each in layout)
    photos.mkdir(parents=True), masks.mkdir(parents=True)
    for i, (height, width) in enumerate(sizes):
        rng = np.random.default_rng(i)
        y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
        distance = ((y - rng.uniform(0.3, 0.7)) / 0.3) ** 2 + ((x - rng.uniform(0.3, 0.7)) / rng.uniform(0.2, 0.5)) ** 2
        colours = rng.integers(0, 256, (2, 3))
        image = np.where((distance < 1)[..., None], *colours) + rng.normal(0, 12, (height, width, 3))
        name = f"{(i * 7) % len(sizes):02}"  # not written in the order of the names
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(photos / f"{name}.jpg", quality=95)
        grey = ((1.2 - distance) * 400).clip(0, 255).astype(np.uint8)
        Image.fromarray(grey).save(masks / f"{name}.png")
    return photos, masks


def normalised(images) -> torch.Tensor:
    pixels = np.stack([each.transpose(2, 0, 1) for each in images]).astype(np.float32) / 255
    return torch.from_numpy((pixels - MEAN[:, None, None]) / STD[:, None, None]).contiguous()


def plain_square(path, resize: int, size: int) -> np.ndarray:
    image = Image.open(path)
    width, height = image.size
    scale = (resize, int(resize * height / width)) if width < height else (int(resize * width / height), resize)
    image = image.resize(scale, Image.Resampling.BILINEAR)
    left, top = round((scale[0] - size) / 2), round((scale[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def plain_f(mask: np.ndarray, target: np.ndarray) -> float:
    hits = (mask & target).sum()
    precision = hits / mask.sum() if mask.any() else 1
    recall = hits / target.sum() if target.any() else 1
    return 1.3 * precision * recall / (0.3 * precision + recall) if precision + recall else 0


def plain(photos, masks, network, *, filter, statistics, polarity="batch", size=96, resize=111) -> dict:
    """The protocol as its description reads."""
    names, curves, found = sorted(each.stem for each in photos.iterdir()), [], {"acc": [], "iou": [], "mae": []}
    for start in range(0, len(names), 8):
        images = [plain_square(photos / f"{name}.jpg", resize, size) for name in names[start : start + 8]]
        soft = network.probabilities(normalised(images), batch_statistics=statistics == "batch").numpy()
        if polarity == "batch" and soft.mean() > 0.5:
            soft = 1 - soft
        if polarity == "image":
            soft = np.stack([1 - each if each.mean() > 0.5 else each for each in soft])
        for name, image, mask in zip(names[start : start + 8], images, soft, strict=True):
            target = plain_square(masks / f"{name}.png", resize, size) >= 128
            if filter == "guided":
                mask = guided_filter(mask[None], image, radius=9, eps=1e-3)[0]
            if filter == "bilateral":
                mask = Bilateral(refine_preset="sempart")(mask[None], image)[0][0]
            found["acc"].append(((mask > 0.5) == target).mean())
            found["iou"].append(((mask > 0.5) & target).sum() / ((mask > 0.5) | target).sum())
            found["mae"].append(np.abs(mask - target).mean(dtype=float))
            curves.append([plain_f(mask > np.float32(k) / np.float32(255), target) for k in range(255)])
    curve = np.mean(curves, 0)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return means | {"max_f": curve.max(), "curve": curve, "best": int(curve.argmax())}


def summaries(folder) -> dict[tuple[str, str], dict]:
    """The rows of the summary by filter and statistics."""
    rows = pq.read_table(folder / "metrics/summary").to_pylist()
    return {(its["filter"], its["statistics"]): row for row in rows if (its := json.loads(row["options"]))}
