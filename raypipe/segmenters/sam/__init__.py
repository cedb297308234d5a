"""SAM's automatic mask generator, and GloPER's reading of its masks as pattern: largest, second, others, rest.

Equal to the official generator, but only candidates with a good predicted IoU are ever up-sampled, and masks reach the
image's size after all suppression. transformers' `mask-generation` pipeline suppresses by other rules.

Here are the method, its options and the course of the work. `network` knows transformers' network and official
checkpoints: prepared crops in, features and low masks out. `generator` knows the official rules for candidates: crops,
points, filters, suppression; it knows no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from raypipe import lookup, networks
from raypipe.segmenters.sam import generator, network
from raypipe.segmenters.sam.generator import Candidates, Crop, Record
from raypipe.types import PatternSegmenter, Segments, fill_preset

if TYPE_CHECKING:
    import torch

# gloper: the baseline of the GloPER supplement. library: the official generator as it is.
PRESETS = {
    "gloper": {"points_per_side": 64, "crop_n_layers": 2, "result": "complementary", "foreground": "rembg"},
    "library": {"points_per_side": 32, "crop_n_layers": 0, "result": "masks", "foreground": "whole"},
}
RESULTS = ("complementary", "masks")
LABELS = ("rest", "others", "largest", "second")  # of complementary masks


@dataclass
class Sam(PatternSegmenter):
    """All masks that a grid of points prompts, or four masks of a foreground made of them."""

    # Weights and preset gloper are the GloPER supplement's, preset library and the rest the official generator's.
    weights: str = "facebook/sam-vit-huge"  # Hugging Face id, folder or official .pth
    preset: Literal["gloper", "library"] = "gloper"  # sets the options below that are None
    result: Literal["complementary", "masks"] | None = None  # rest, others, largest and second of a foreground, or all
    foreground: str | None = None  # rembg[:model or file.onnx], grabcut, whole, given:DIR, boxes:FILE or run:DIR
    points_per_side: int | None = None  # points a side of every crop: 64, with preset library 32
    crop_n_layers: int | None = None  # layers of ever smaller crops: 2, with preset library 0
    crop_n_points_downscale_factor: int = 1  # layer i has points_per_side / factor**i points a side
    crop_overlap_ratio: float = 512 / 1500  # overlap of crops as a part of the shorter side; halves by layer
    pred_iou_thresh: float = 0.88  # masks stay above this predicted IoU; sweep 0.7..0.92
    stability_score_thresh: float = 0.95  # masks stay from this stability on; sweep 0.85..0.97
    stability_score_offset: float = 1.0  # shift of the logits that stability is measured with
    box_nms_thresh: float = 0.7  # box IoU above which a better mask of the same crop replaces one
    crop_nms_thresh: float = 0.7  # box IoU above which one of a smaller crop replaces one
    min_mask_region_area: int = 0  # px; smaller holes and islands are removed, 0 = none; sweep 0, 100
    points_per_batch: int = 64  # prompts that the decoder takes at a time; up to 1024 on large GPUs
    crops_per_batch: int = 4  # crops that the encoder takes at a time: 1 GB of attention bias each with ViT-H
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the networks; auto = bfloat16 on a GPU

    source = "Kirillov et al., ICCV 2023, with the settings of the GloPER supplement (Chen, Koh, Dobbie)"
    licence = "Apache-2.0"
    networks, licences = ("weights",), {"weights": "Apache-2.0"}
    model_types = {"weights": "sam"}
    needs = (
        "facebook/sam-vit-huge, 2.6 GB: fetched on the first run, or by `raypipe weights sam`; "
        "without a GPU hours per image, and minutes with `--preset library`"
    )
    presets = PRESETS
    across = "object"
    gpus = 1.0
    batch_size = 1  # one image is 86 016 prompts
    timeout = 6 * 3600.0  # 0.4 PFLOP per image: hours on a CPU core; 0.01 with preset library

    def __post_init__(self):
        fill_preset(self)
        super().__post_init__()
        networks.settle_options(self)
        if self.result not in RESULTS:
            raise ValueError(f"sam: unknown result {self.result!r}; {lookup.suggest(self.result, RESULTS)}")
        for name in ("points_per_side", "crop_n_points_downscale_factor", "points_per_batch", "crops_per_batch"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("crop_n_layers", "min_mask_region_area", "stability_score_offset"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh", "crop_nms_thresh"):
            self._check(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self._check("crop_overlap_ratio", 0 <= self.crop_overlap_ratio < 1, "at least 0 and below 1")
        self._check_crops()

    def _check(self, name: str, is_good: bool, expected: str) -> None:
        if not is_good:
            raise ValueError(f"sam: {name} must be {expected}, got {getattr(self, name)!r}")

    def _check_crops(self) -> None:
        if not self._points_a_side(self.crop_n_layers):
            text = f"points_per_side {self.points_per_side} leaves no point in crops of layer {self.crop_n_layers}"
            raise ValueError(f"sam: {text}; lower crop_n_points_downscale_factor or crop_n_layers")
        for name in ("crop_n_points_downscale_factor", "crop_overlap_ratio"):
            if not self.crop_n_layers and getattr(self, name) != getattr(Sam, name):
                raise ValueError(f"sam: {name} {getattr(self, name)!r} has no effect: crop_n_layers is 0")

    def _points_a_side(self, layer: int) -> int:
        return int(self.points_per_side / self.crop_n_points_downscale_factor**layer)

    def untiled(self) -> str:
        reason = "whose largest mask of a tile is not that of the image; add --result masks, or --preset library"
        return reason if self.result == "complementary" else ""

    def load(self, device: str) -> None:
        self._path = networks.locate(self.weights, method=self.name)
        self._network = network.load(self._path, device)
        self._side = self._network.config.vision_config.image_size

    def checksums(self) -> dict[str, str]:
        return networks.checksums(self._path)

    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[Segments]:
        for image, foreground in zip(images, foregrounds, strict=True):
            records = self.generate(image * foreground[..., None]) if foreground.any() else []
            if self.result == "complementary":
                found = complementary(records, foreground)
            else:
                found = inside_foreground(records, foreground)
            if not foreground.any():
                found.note = "empty_foreground"
            yield found

    def generate(self, image: np.ndarray) -> list[Record]:
        """All masks of an image, RGB uint8 (H, W, 3), in the official generator's order."""
        import torch

        size, records = image.shape[:2], []
        crops = generator.crop_boxes(size, layers=self.crop_n_layers, overlap_ratio=self.crop_overlap_ratio)
        with torch.inference_mode():
            for start in range(0, len(crops), self.crops_per_batch):
                group = crops[start : start + self.crops_per_batch]
                parts = [network.resize(image[crop.y0 : crop.y1, crop.x0 : crop.x1], self._side) for crop in group]
                pixels = network.normalise(parts, self._side, self._network.device.type)
                features = network.encode(self._network, pixels, dtype=self.dtype)
                for own, crop in zip(features, group, strict=True):
                    records += self._in_crop(own, crop, size)
        if len(crops) > 1:
            records = generator.prefer_small_crops(records, self.crop_nms_thresh)
        if self.min_mask_region_area:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            records = generator.clean(records, size, min_area=self.min_mask_region_area, threshold=threshold)
        return records

    def _in_crop(self, features: torch.Tensor, crop: Crop, size: tuple[int, int]) -> list[Record]:
        """The masks of one crop, best first. features: (C, h, w) of it. size: (height, width) of the image."""
        import torch

        grid = generator.point_grid(self._points_a_side(crop.layer)) * crop.size[::-1]
        batches = torch.from_numpy(grid).to(features.device).split(self.points_per_batch)
        found = generator.join(self._in_batch(features, points, crop, size) for points in batches)
        found = generator.take(found, generator.suppress(found.boxes, found.scores, self.box_nms_thresh))
        return generator.records(found, self._upsampled(found.logits, crop), crop)

    def _in_batch(self, features: torch.Tensor, points: torch.Tensor, crop: Crop, size: tuple[int, int]) -> Candidates:
        """What some points of a crop prompt and the filters leave. points: (P, 2) float64, (x, y) px in the crop."""
        import torch

        height, width = network.input_size(crop.size, self._side)
        scale = torch.tensor([width / crop.size[1], height / crop.size[0]], dtype=points.dtype, device=points.device)
        logits, scores = network.decode(self._network, features, points * scale, dtype=self.dtype)
        points = points.repeat_interleave(scores.shape[1], 0)  # the masks of a point stand side by side
        logits, scores = logits.flatten(0, 1), scores.flatten()
        good = scores > self.pred_iou_thresh
        logits, scores, points = logits[good], scores[good], points[good]
        measured = [
            (generator.stability(part, self.stability_score_offset), generator.mask_boxes(part > 0))
            for part in self._upsampled(logits, crop)
        ]
        stability, boxes = map(torch.cat, zip(*measured, strict=True))
        found = Candidates(logits, scores, stability, boxes, points)
        cut_off = generator.is_cut_off(boxes, crop, size)
        return generator.take(found, (stability >= self.stability_score_thresh) & ~cut_off)

    def _upsampled(self, logits: torch.Tensor, crop: Crop) -> Iterator[torch.Tensor]:
        """Logits (M, s, s) at the crop's size, a few at a time: float32 (m, H, W)."""
        inner = network.input_size(crop.size, self._side)
        return generator.upsample(logits, side=self._side, input_size=inner, size=crop.size)


def complementary(records: Sequence[Record], foreground: np.ndarray) -> Segments:
    """GloPER's reading of all masks as pattern: what no mask but the largest covers, its opposite, largest, second.

    foreground: (H, W) bool; all four masks lie inside it, and the first two share it out. Ties keep the given order.
    """
    ordered = sorted(records, key=lambda record: -record.area)
    others, largest, second = (np.zeros(foreground.shape, bool) for _ in range(3))
    for canvas, chosen in ((others, ordered[1:]), (largest, ordered[:1]), (second, ordered[1:2])):
        for record in chosen:
            record.paste(canvas)
    masks = np.stack([~others, others, largest, second]) & foreground
    return Segments(masks, LABELS, note="few_masks" if len(records) < 2 else "")


def inside_foreground(records: Sequence[Record], foreground: np.ndarray) -> Segments:
    """All masks in the given order with their predicted IoU, cut to the foreground (H, W); empty ones are left out."""
    masks, scores = np.zeros((len(records), *foreground.shape), bool), []
    for record in records:
        mask = record.paste(masks[len(scores)])  # an empty one leaves its place to the next
        mask &= foreground
        if mask.any():
            scores.append(record.score)
    return Segments(masks[: len(scores)], scores=scores)


SEGMENTER = Sam
