"""MaskCLIP in the plainest form: one image at a time, the whole network, scores of all categories at full size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe import classes, networks
from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, in_turns
from raypipe.features.clip import MEAN, STD, read_templates
from raypipe.segmenters._named import Upsampling, label_map

MANY = 171  # categories of COCO-Stuff


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """In full batches, against one image at a time; and what follows the network alone, with many categories."""
    plain, batch = PlainMaskclip(method, device), method.batch_size if device == "cuda" else 1
    arms = [lambda image: list(method.segment([image] * batch))[0], plain]
    (ours, other), found = in_turns(arms, images, repeats)
    differences = [unlike(mine, labels, method) for mine, labels in zip(*found, strict=True)]
    against = f"{device}; the whole network, scores at full size, one image at a time"
    return [
        *compared(method.name, [[total / batch for total in ours], other], against),
        Figure(method.name, "share of pixels unlike plain", "", differences, f"ours in batches of {batch}"),
        *_after_the_network(method, device, images, repeats),
    ]


def unlike(found, labels: np.ndarray, method) -> float:
    """The share of pixels that a label map has in another category. labels: int (H, W), the number or -1."""
    names = classes.read(method.classes).names
    numbers = np.array([-1, *(names.index(name) for name in found.labels)])
    return float((np.where(found.values > (method.threshold or 0), numbers[found.index], -1) != labels).mean())


def _after_the_network(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """From cosines of many categories to a label map, by rows and with all scores at once."""
    import torch

    grid = torch.randn((MANY, 32, 32), generator=torch.Generator().manual_seed(0)).mul_(0.05).to(device)
    names, size = [str(i) for i in range(MANY)], images[0].shape[:2]

    def rows(image: np.ndarray):
        return label_map(Upsampling(grid, image.shape[:2]), image.shape[:2], names, temperature=method.temperature)

    def whole(image: np.ndarray) -> np.ndarray:
        return labels_of(grid, [image.shape[:2]], method.temperature, threshold=0.0)

    seconds, _ = in_turns([rows, whole], images[:1], repeats)
    case = f", {MANY} categories, {size[1]} x {size[0]} px, after the network"
    return compared(method.name, seconds, f"{device}; all scores at full size", case=case)


class PlainMaskclip:
    """As the paper says it, on transformers' CLIPModel, with the options of a method that change its result."""

    def __init__(self, method, device: str):
        from transformers import CLIPModel, CLIPTokenizer

        path = networks.locate(method.weights, method=method.name)
        self._network = CLIPModel.from_pretrained(path).eval().to(device)
        self._tokenizer, self._method, self._device = CLIPTokenizer.from_pretrained(path), method, device
        self._texts = self._embed(classes.read(method.classes).queries, read_templates(method.templates))

    def _embed(self, queries: Sequence[str], templates: Sequence[str]):
        """One row per query, (C, D)."""
        import torch

        rows = []
        for query in queries:
            texts = [template.replace("{}", query) for template in templates]
            words = self._tokenizer(texts, return_tensors="pt", padding=True, truncation=True).to(self._device)
            with torch.inference_mode():
                found = self._network.text_projection(self._network.text_model(**words).pooler_output)
            mean = (found / found.norm(dim=1, keepdim=True)).mean(0)
            rows.append(mean / mean.norm())
        return torch.stack(rows)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The number of each pixel's category, -1 where it is background: int (H, W), of RGB uint8 (H, W, 3)."""
        import cv2
        import torch
        from torch.nn.functional import pad

        method, patch = self._method, self._network.config.vision_config.patch_size
        factor = min(method.short_side / min(image.shape[:2]), method.max_side / max(image.shape[:2]))
        height, width = (max(1, int(side * factor + 0.5)) for side in image.shape[:2])
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        pixels = torch.tensor((small / 255.0 - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None]
        pixels = pad(pixels.to(self._device), (0, -width % patch, 0, -height % patch))
        with torch.inference_mode():
            scores = torch.einsum("cd,dhw->chw", self._texts, self._features(pixels))
            sizes = [pixels.shape[2:], (height, width), image.shape[:2]]
            return labels_of(scores, sizes, method.temperature, threshold=method.threshold or 0.0)

    def _features(self, pixels):
        """Of each patch, of length 1: (D, h, w)."""
        vision = self._network.vision_model
        states = vision(pixel_values=pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        last, tokens = vision.encoder.layers[-1], states[-2]  # what the last layer is given
        values = tokens + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(tokens)))
        values = values + last.mlp(last.layer_norm2(values))
        found = self._network.visual_projection(vision.post_layernorm(values))[0, 1:]
        found = found / found.norm(dim=1, keepdim=True)
        return found.T.unflatten(1, [side // vision.embeddings.patch_size for side in pixels.shape[2:]])


def labels_of(scores, sizes: Sequence[tuple[int, int]], temperature: float, *, threshold: float) -> np.ndarray:
    """The number of each pixel's category or -1, int (H, W), from scores (C, h, w) through sizes, the last the image's.

    The first is that of the padded image, of which the second is cut out.
    """
    from torch.nn.functional import interpolate

    whole = interpolate(scores[None], size=tuple(sizes[0]), mode="bilinear")
    if len(sizes) > 1:
        height, width = sizes[1]
        whole = interpolate(whole[..., :height, :width], size=tuple(sizes[2]), mode="bilinear")
    probability, labels = (whole[0] * temperature).softmax(0).max(0)
    return labels.masked_fill(probability <= threshold, -1).cpu().numpy()
