"""The one feature that the images of a category have in common (Shin, Xie, Albanie, NeurIPS 2022, section 3.2).

Functions of what frozen networks say of the images: nothing here knows a network. All tensors are float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

TEXT_TEMPERATURE = 10.0  # of the cosine with a text (reference)
SLICES = ("corrected", "released")
TOGETHER = 8  # images that one is compared with at a time: 1.2 MB of cosines at 14 x 14, which stay in a cache
EPS = 1e-8  # added to norms, for features that are 0


class Found(NamedTuple):
    """What the images of one category have in common."""

    vector: Tensor  # (D,), of length 1
    seeds: Tensor  # (n,) int64: of each image the pixel, row-major, that the others support most
    support: Tensor  # (n, h, w): how much they support each


def language_attention(
    dense: Tensor, text: Tensor, size: tuple[int, int], *, temperature: float = TEXT_TEMPERATURE
) -> Tensor:
    """How well each place fits a text: (n, h, w) in (0, 1), bilinear from the grid of `dense`.

    dense: of CLIP, (n, Dt, hc, wc). text: (Dt,). size: (h, w). The sigmoid comes first, then the interpolation.
    """
    from torch.nn.functional import interpolate

    return interpolate(likeness(dense, text[None], temperature=temperature), size=size, mode="bilinear")[:, 0]


def likeness(features: Tensor, vectors: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Sigmoid of the cosine with each vector, times a temperature.

    features: (n, D, h, w). vectors: (C, D). Neither need have length 1. Returns (n, C, h, w).
    """
    import torch

    scale = temperature / (features.norm(dim=1, keepdim=True) + EPS)
    return (torch.einsum("ndhw,cd->nchw", features, unit(vectors)) * scale).sigmoid()


def unit(vectors: Tensor) -> Tensor:
    """Vectors (..., D) at length 1; 0 stays 0."""
    return vectors / (vectors.norm(dim=-1, keepdim=True) + EPS)


def weights(features: Tensor, attention: Tensor | None, contexts: Tensor) -> Tensor:
    """How much each place counts: (n, h, w), more where it fits the text and less where it is like a context.

    features: (n, D, h, w). attention: of `language_attention`; None without. contexts: (m, D), m may be 0. Each context
    leaves 0.27 to 0.73; only the relative size matters, so nothing is scaled.
    """
    weight = (1 - likeness(features, contexts)).prod(1)
    return weight if attention is None else weight * attention


def cosegment(features: Tensor, weight: Tensor, *, slices: str = "corrected") -> Found:
    """The seeds of a category's images, and the mean of their features. features: (n, D, h, w). weight: (n, h, w)."""
    count, _, height, width = features.shape
    support = supports(features, weight, slices=slices).mean(1).view(count, height, width)
    seeds = support.flatten(1).argmax(1)  # the first of several
    chosen = features.flatten(2).gather(2, seeds.view(-1, 1, 1).expand(-1, features.shape[1], 1))[..., 0]  # (n, D)
    return Found(unit(chosen.mean(0)), seeds, support)


def supports(features: Tensor, weight: Tensor, *, slices: str = "corrected") -> Tensor:
    """How much each image supports each pixel of all: (n * h * w, n), its best weighted cosine with one of its own.

    Of each pair only the weight of the supporting pixel counts. Two images' cosines serve both ways, and few are there
    at a time: the matrix of all pairs never is. slices: `released` takes images j to 2j for image j, as the published
    code does by a slip.
    """
    import torch

    pixels, weight = unit(features.flatten(2).transpose(1, 2)), weight.flatten(1)  # (n, P, D), (n, P)
    count, size = weight.shape
    found = pixels.new_empty(count, size, count)
    for j in range(count):
        for first in range(j, count, TOGETHER):
            others = slice(first, min(count, first + TOGETHER))
            cosines = (pixels[j] @ pixels[others].flatten(0, 1).T).unflatten(1, (-1, size))  # (P, others, P)
            found[others, :, j] = (cosines * weight[j, :, None, None]).amax(0)
            found[j, :, others] = (cosines * weight[others]).amax(2)
    found = found.flatten(0, 1)
    if slices == "corrected":
        return found
    return torch.stack([found[:, j : 2 * j + 1].amax(1) for j in range(count)], 1)
