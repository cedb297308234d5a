"""FOUND: what the background is not must be objects (Simeoni et al., CVPR 2023).

The patch that DINO's class token looks at least is background, and so is all that resembles it: the `background`
variant, which needs no training. From such masks the authors taught a decoder of 385 numbers, one linear function of
the keys of DINO's last block: the `decoder` variant, with their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from raypipe import masks
from raypipe.features import originals
from raypipe.features.checkpoints import S8_300, check_checkpoint
from raypipe.segmenters._discovery import Discovery
from raypipe.types import BadImage, Segments

if TYPE_CHECKING:
    import torch

    from raypipe.features.grid import Features

DECODER = (  # at the commit that published it
    "https://github.com/valeoai/FOUND/raw/f9f2ef709002037c5498ce571115ad76b9627c31/data/weights/decoder_weights.pt"
)
OF_BACKGROUND = ("bkg_threshold", "apply_weights", "stretch")  # options of that variant only
EPS = 1e-10  # of the shares of patches that heads attend to (reference)


@dataclass
class Found(Discovery):
    """One mask of the objects in an image: the probability that a decoder gives each pixel, or whatever is unlike the
    background. It is soft with the decoder, unless one component or box is asked for.

    Published as "FOUND - multi" is `components=multi`, as "FOUND - single" `components=single`. That mask is hard, as
    it is published and given to the bilateral solver: the part is chosen at 0.5, and a threshold that comes later could
    only break it into several. Notes: `empty_mask`, nothing is above 0.5; a hard mask is left out then, and the box is
    the whole image; `degenerate`, an image of one colour: an empty mask, and the box as before.
    """

    weights: str = DECODER  # the decoder: a file, .pt or .safetensors; the variant background needs none
    # what it was trained on: DINO ViT-S/8 of 300 epochs. The variant background takes any DINO or DINOv2
    backbone: str = S8_300
    variant: Literal["decoder", "background"] = "decoder"  # background: no trained part beside the backbone
    components: Literal["multi", "single"] = "multi"  # single: the largest 4-connected part of the mask, hard
    result: Literal["mask", "box"] = "mask"  # box: the largest part of the patch grid, whose bounds are the box
    bkg_threshold: float = 0.3  # cosine with the reference patch above which a patch is background; sweep 0.1..0.5
    apply_weights: bool = True  # heads that look at few patches count more
    stretch: bool = False  # as the reference: the padded patch grid squeezed into the image, up to 7 px off

    source = "Simeoni et al., CVPR 2023"
    licence = "Apache-2.0 (weights)"
    networks, licences = ("weights", "backbone"), {"weights": "Apache-2.0", "backbone": "Apache-2.0"}
    model_types = {"backbone": "vit"}
    needs = (
        "the authors' decoder (3 kB) and DINO ViT-S/8 of 300 epochs (87 MB): fetched on the first run, or by "
        "`raypipe weights found`"
    )
    stages = {"features": ("components", "result", *OF_BACKGROUND)}

    def __post_init__(self):
        if not -1 <= self.bkg_threshold < 1:
            raise ValueError(f"found: bkg_threshold must be at least -1 and below 1, got {self.bkg_threshold!r}")
        if (self.result, self.components) == ("box", "single"):
            raise ValueError("found: components 'single' has no effect with the result 'box', which is one component")
        for name in OF_BACKGROUND:
            if self.variant == "decoder" and (value := getattr(self, name)) != getattr(Found, name):
                raise ValueError(f"found: {name} {value!r} has no effect with the variant 'decoder'")
        super().__post_init__()
        self._check_backbone()
        if self.variant == "background":
            self.networks, self.model_types = ("backbone",), {}

    @property
    def soft(self) -> bool:
        """Only the decoder has probabilities, and only of all components: published single masks are hard."""
        return (self.variant, self.components, self.result) == ("decoder", "multi", "mask")

    @property
    def FACET(self) -> str:
        """The decoder is read off what keys are projected from; see `fold`."""
        return "input" if self.variant == "decoder" else "key"

    @property
    def CLS_ATTENTION(self) -> bool:
        return self.variant == "background"

    def load(self, device: str) -> None:
        super().load(device)
        self._check_backbone()  # again, for a folder may be on another machine than the driver's
        if self.variant == "decoder":
            decoder = read_decoder(self._paths["weights"], width=self._dino.width)
            self._weight, self._bias = fold(*decoder, self._dino.projection("key"))

    def _check_backbone(self) -> None:
        if self.variant == "decoder":  # on another backbone it gives noise
            check_checkpoint(self.backbone, needed=S8_300, method=self.name)

    def find(self, images: Sequence[np.ndarray], features: Sequence[Features]) -> Iterator[Segments]:
        for image, each in zip(images, features, strict=True):
            if self.result == "box":
                yield self._box(each, image.shape[:2])
            else:
                yield self._mask(each, image.shape[:2])

    def _mask(self, features: Features, size: tuple[int, int]) -> Segments:
        """The mask at an image's size: soft, or hard and then none where it is empty."""
        if self.variant == "decoder":
            probability = upsample(self._logits(features), features, size).sigmoid()
            mask = probability > 0.5
        else:
            mask = upsample(self._foreground(features).float(), features, size, stretch=self.stretch) > 0.5
        note = "" if mask.any() else "empty_mask"
        if self.soft:
            return Segments(probability[None].cpu().numpy(), note=note)
        mask = mask.cpu().numpy()
        found = masks.largest_component(mask) if self.components == "single" else mask
        return Segments(found[None][: int(not note)], note=note)

    def _box(self, features: Features, size: tuple[int, int]) -> Segments:
        """The largest component of the patch grid; the whole image where there is none, as a box has to be."""
        is_decoder = self.variant == "decoder"
        cells = self._logits(features).sigmoid() > 0.5 if is_decoder else self._foreground(features)
        component = masks.largest_component(cells.cpu().numpy())
        if not component.any():
            return Segments(np.ones((1, *size), bool), note="empty_mask")
        return Segments(features.enlarged(component[None], size))

    def _logits(self, features: Features) -> torch.Tensor:
        """What the decoder says of each cell: float32 (h, w)."""
        return (features.patches @ self._weight + self._bias).reshape(features.grid)

    def _foreground(self, features: Features) -> torch.Tensor:
        """The cells that are no background: bool (h, w)."""
        if not features.cls_attention.isfinite().all():
            raise BadImage(
                "segment", "non_finite", "the attention of the network has values that are no finite numbers"
            )
        options = {"threshold": self.bkg_threshold, "weighted": self.apply_weights}
        return ~background(features.patches, features.cls_attention, **options).reshape(features.grid)


def background(
    keys: torch.Tensor, attention: torch.Tensor, *, threshold: float = 0.3, weighted: bool = True
) -> torch.Tensor:
    """Which patches are background: bool (P,) (Simeoni et al., CVPR 2023).

    keys: float (P, heads * d). attention: float (heads, P), of the class token. Only the row of the reference patch of
    the similarity matrix is computed.
    """
    weights = head_weights(attention) if weighted else attention.new_ones(len(attention))
    return similarity(keys, weights, int((weights @ attention).argmin())) > threshold


def head_weights(attention: torch.Tensor) -> torch.Tensor:
    """How much each head counts: float (heads,). The fewer patches it looks at more than all heads do on average."""
    shares = (attention > attention.mean()).float().mean(1) + EPS
    return (shares.sum() / shares).log()


def similarity(keys: torch.Tensor, weights: torch.Tensor, reference: int) -> torch.Tensor:
    """Cosine of each patch with the reference patch, of keys (P, heads * d) whose heads are weighted: float (P,)."""
    import torch

    heads = keys.unflatten(1, (len(weights), -1)) * weights[:, None]  # (P, heads, d)
    descriptors = torch.nn.functional.normalize(heads.flatten(1), dim=1)
    return descriptors @ descriptors[reference]


def upsample(cells: torch.Tensor, features: Features, size: tuple[int, int], *, stretch: bool = False) -> torch.Tensor:
    """Values of cells, float (h, w), bilinear at an image's size (H, W).

    Each cell is as large as a patch, and padding is cut off. stretch: as the reference enlarges its background masks,
    the padded grid as a whole is squeezed into the image.
    """
    from torch.nn.functional import interpolate

    values = cells[None, None]
    if not stretch:
        values = interpolate(values, scale_factor=features.patch, mode="bilinear")
        values = values[..., : features.seen[0], : features.seen[1]]
    if values.shape[2:] != size:
        values = interpolate(values, size=size, mode="bilinear")
    return values[0, 0]


def read_decoder(path: Path, *, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight, float32 (width,), and bias (1,) of a published decoder. Raises ValueError for another file or width."""
    file = originals.checkpoint(path, method="found") or path
    tensors = originals.tensors(file, method="found")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {"weight": (1, width, 1, 1), "bias": (1,)}
    if shapes != expected:
        text = f"expected tensors {expected} for a backbone of width {width}, got {shapes}"
        raise ValueError(f"found: {file} is no decoder for this backbone: {text}")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):  # a hard mask would be empty without a word
        raise ValueError(f"found: {file} is damaged: it holds values that are no finite numbers; fetch it again")
    return tensors["weight"].float().flatten(), tensors["bias"].float()


def fold(weight: torch.Tensor, bias: torch.Tensor, keys: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder of keys as one of what keys are projected from: weight (D,) and bias (1,), float32 on their device.

    The decoder of a key W x + b is weight . (W x + b) + bias, so weight W and weight . b + bias are all that is needed
    of the projection: D products per patch instead of D * D.
    """
    weight, bias = weight.to(keys.weight).double(), bias.to(keys.weight).double()
    return (weight @ keys.weight.double()).float(), (weight @ keys.bias.double() + bias).float()


SEGMENTER = Found
