"""NamedMask in the plainest form: layer by layer with batch norms, all classes at the photograph's size, one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raypipe import networks
from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import with_plain

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-5  # of batch norms
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def compare(method, device: str, images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """In full batches, against one image at a time."""
    from raypipe.segmenters.namedmask.network import read

    deeplab, _ = read(method._path, method=method.name)
    tensors = deeplab.to(device).state_dict()

    def plain_one(image: np.ndarray) -> np.ndarray:
        labels = probabilities(tensors, image, deeplab.rates).argmax(0).cpu().numpy()
        return np.stack([labels == label for label in np.unique(labels[labels > 0])] or [np.zeros(labels.shape, bool)])

    against = "float32, batch norms apart, probabilities of all classes at the image's size, one image at a time"
    return with_plain(method, device, images, repeats, plain_one, against)


def probabilities(tensors: Mapping[str, Tensor], image: np.ndarray, rates: Sequence[int] = (12, 24, 36)) -> Tensor:
    """Softmax of all classes, the background first: float32 (C, H, W). image: RGB uint8 (H, W, 3)."""
    import torch

    like = tensors["classifier.classifier.3.bias"]
    mean, std = (like.new_tensor(each)[:, None, None] for each in (MEAN, STD))
    pixels = (torch.tensor(image, device=like.device).permute(2, 0, 1) / 255 - mean) / std
    with torch.inference_mode(), networks.autocast(like.device.type, "float32"):  # TF32 would keep 11 of 24 bits
        return logits(tensors, pixels[None], rates)[0].softmax(0)


def logits(tensors: Mapping[str, Tensor], pixels: Tensor, rates: Sequence[int]) -> Tensor:
    """Logits (B, C, H, W) of a network's tensors at an output stride of 8. pixels: normalised (B, 3, H, W)."""
    import torch
    from torch.nn.functional import conv2d, interpolate, max_pool2d

    def step(x: Tensor, convolution: str, norm: str, **options) -> Tensor:
        x = conv2d(x, tensors[f"{convolution}.weight"], **options)
        mean, variance, weight, bias = (
            tensors[f"{norm}.{each}"][:, None, None] for each in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + EPS).sqrt() * weight + bias

    def separable(x: Tensor, name: str, norm: str, rate: int) -> Tensor:
        x = conv2d(x, tensors[f"{name}.body.0.weight"], padding=rate, dilation=rate, groups=x.shape[1])
        return step(x, f"{name}.body.1", norm).relu()

    def bottleneck(x: Tensor, name: str, stride: int, rate: int) -> Tensor:
        inner = step(x, f"{name}.conv1", f"{name}.bn1").relu()
        options = {"stride": stride, "padding": rate, "dilation": rate}
        inner = step(inner, f"{name}.conv2", f"{name}.bn2", **options).relu()
        inner = step(inner, f"{name}.conv3", f"{name}.bn3")
        if f"{name}.downsample.0.weight" in tensors:
            x = step(x, f"{name}.downsample.0", f"{name}.downsample.1", stride=stride)
        return (inner + x).relu()

    x = step(pixels, "backbone.conv1", "backbone.bn1", stride=2, padding=3).relu()
    x, taps = max_pool2d(x, 3, stride=2, padding=1), []
    for stage, stride, first, later in ((1, 1, 1, 1), (2, 2, 1, 1), (3, 1, 1, 2), (4, 1, 2, 4)):
        block = 0
        while f"backbone.layer{stage}.{block}.conv1.weight" in tensors:
            options = {"stride": 1, "rate": later} if block else {"stride": stride, "rate": first}
            x = bottleneck(x, f"backbone.layer{stage}.{block}", **options)
            block += 1
        taps.append(x)
    pyramid = "classifier.aspp.convs"
    found = [step(x, f"{pyramid}.0.0", f"{pyramid}.0.1").relu()]
    found += [separable(x, f"{pyramid}.{i}.0", f"{pyramid}.{i}.1", rate) for i, rate in enumerate(rates, 1)]
    pooled = step(x.mean((2, 3), keepdim=True), f"{pyramid}.4.1", f"{pyramid}.4.2").relu()
    found += [interpolate(pooled, size=x.shape[2:], mode="bilinear")]
    x = step(torch.cat(found, dim=1), "classifier.aspp.project.0", "classifier.aspp.project.1").relu()
    low = step(taps[0], "classifier.project.0", "classifier.project.1").relu()
    x = torch.cat([low, interpolate(x, size=low.shape[2:], mode="bilinear")], dim=1)
    x = separable(x, "classifier.classifier.0", "classifier.classifier.1", 1)
    x = conv2d(x, tensors["classifier.classifier.3.weight"], tensors["classifier.classifier.3.bias"])
    return interpolate(x, size=pixels.shape[2:], mode="bilinear")
