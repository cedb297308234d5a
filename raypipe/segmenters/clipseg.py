"""The region that a text names, by CLIPSeg, within a foreground (GloPER supplement, "CLIPSeg")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raypipe import networks
from raypipe.features import clip_vit
from raypipe.segmenters import _inside
from raypipe.types import PatternSegmenter, Segments

PATCH = 16  # px: the image encoder is a ViT-B/16
FLAT = 1e-5  # range of a map, as a part of its highest value, up to which it is constant: float32 rounding of logits


@dataclass
class Clipseg(PatternSegmenter):
    """One soft mask: how well each place fits the prompt, stretched to 0..1 over the image (with `stretch`)."""

    # Threshold and size are the reference's ("Pattern of <species>" is its prompt), the rest the GloPER supplement's.
    threshold: float | None = 0.3  # of the stretched probability; 0.2 to 0.7 are worth a sweep; None means 0.5
    weights: str = "CIDAS/clipseg-rd64-refined"  # a Hugging Face id or a folder
    # The reference's prompt names the species, which is the name of an image's folder: a method does not see that.
    prompt: str = "pattern of animal"  # what to look for, in words
    size: int = 352  # side of the network's square input in px, a multiple of 16
    # stretch each map to 0..1, which finds something in every image; no: probabilities as they are, for --tiles
    stretch: bool = True
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the network; auto = bfloat16 on a GPU

    source = "Lueddecke and Ecker, CVPR 2022, with the settings of the GloPER supplement (Chen, Koh, Dobbie)"
    licence = "Apache-2.0 (weights)"
    networks, licences = ("weights",), {"weights": "Apache-2.0"}
    model_types = {"weights": "clipseg"}
    needs = "CIDAS/clipseg-rd64-refined, 0.6 GB: fetched on the first run, or by `raypipe weights clipseg`"
    soft = True
    gpus = 0.25  # the network is small; four actors keep a GPU busy while they prepare images
    batch_size = 32

    def __post_init__(self):
        super().__post_init__()
        networks.settle_options(self)
        _inside.check_size(self.name, self.size, smallest=PATCH)
        if self.size % PATCH:
            raise ValueError(f"clipseg: size must be a multiple of {PATCH}, got {self.size!r}")
        if not self.prompt.strip():
            raise ValueError("clipseg: prompt must say what to look for, got an empty text")

    def untiled(self) -> str:
        reason = "whose map of each tile would be stretched to 0..1, also where nothing is; add --no-stretch"
        return reason if self.stretch else ""

    def load(self, device: str) -> None:
        from transformers import CLIPSegForImageSegmentation

        self._device, self._path = device, networks.locate(self.weights, method=self.name)
        network = networks.pretrained(CLIPSegForImageSegmentation, self._path, method=self.name, device=device)
        if (patch := network.config.vision_config.patch_size) != PATCH:
            raise ValueError(f"clipseg: patches of the weights must be {PATCH} px, got {patch!r}")
        self._embedding = self._embed(network)
        # The decoder reads the outputs of a few blocks only; those behind the last one (2 of 12) decide nothing.
        del network.clip.vision_model.encoder.layers[max(network.extract_layers) + 1 :]
        self._network = network

    def checksums(self) -> dict[str, str]:
        return networks.checksums(self._path)

    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[Segments]:
        for foreground, probability in zip(foregrounds, self._probabilities(images), strict=True):
            yield masked(stretched(probability) if self.stretch else probability, foreground)

    def _probabilities(self, images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The network's answer to each image: float32 (size, size) in [0, 1]."""
        for batch in networks.batches(images, self._device):
            options = {"normalize": True, "resize": networks.squeeze_as_torchvision}  # as CLIPSegProcessor does
            pixels = networks.pixels(batch, self.size, device=self._device, **options)
            yield from self.logits(pixels).sigmoid().cpu().numpy()

    def logits(self, pixels):
        """Float32 (B, size, size) from prepared images, a tensor (B, 3, size, size) on the device of `load`."""
        import torch

        embeddings = self._embedding.expand(len(pixels), -1)
        with torch.inference_mode(), networks.autocast(self._device, self.dtype):
            logits = self._network(pixel_values=pixels, conditional_embeddings=embeddings).logits
        return logits.float().reshape(-1, self.size, self.size)

    def _embed(self, network):
        """The prompt's embedding (1, D). Computed once: it does not depend on the image."""
        import torch

        words = network.config.text_config.vocab_size
        tokens = clip_vit.tokenizer(self._path, words, method=self.name)(self.prompt, return_tensors="pt")
        count, most = tokens.input_ids.shape[1], network.config.text_config.max_position_embeddings
        if count > most:
            raise ValueError(f"clipseg: prompt must have at most {most} tokens, got {count}; use fewer words")
        with torch.inference_mode():
            return network.get_conditional_embeddings(1, **tokens.to(self._device))


def stretched(probability: np.ndarray) -> np.ndarray | None:
    """A map (h, w) moved and scaled to 0..1; None when it is constant."""
    low, high = probability.min(), probability.max()
    return (probability - low) / (high - low) if high - low > FLAT * high else None


def masked(found: np.ndarray | None, foreground: np.ndarray) -> Segments:
    """A map (h, w) at the image's size, 0 outside the foreground; an empty mask with a note where there is nothing.

    foreground: bool (H, W).
    """
    from PIL import Image

    height, width = foreground.shape
    note = _inside.unusable(foreground) or ("flat_map" if found is None else "")
    if note:
        return Segments(np.zeros((1, height, width), np.float32), note=note)
    # Nearest by pixel centres: thresholding before or after makes no difference then. OpenCV does it so since 5 only.
    values = np.asarray(Image.fromarray(found).resize((width, height), Image.Resampling.NEAREST))
    return Segments((values * foreground)[None])


SEGMENTER = Clipseg
