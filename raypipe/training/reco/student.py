"""What makes a bank: frozen networks look at the images of each category, whose features are co-segmented."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from raypipe import networks
from raypipe.features.clip import Clip, digest, read_templates
from raypipe.features.dino import Dino
from raypipe.runtime.progress import Counts, Progress
from raypipe.segmenters.reco import bank, tokens
from raypipe.segmenters.reco.cosegment import Found, cosegment, language_attention, weights
from raypipe.storage import Folder
from raypipe.training import record
from raypipe.training.recipe import Made, Sample
from raypipe.training.reco import SIDE, ReCo
from raypipe.training.reco.plan import Plan

PICTURES = 60  # classes of which the page shows an image
FRAME, RED = 2, (255, 40, 40)  # px of a frame, and its colour


class Seen(NamedTuple):
    """What the networks say of one image."""

    features: Tensor  # (D, h, w)
    attention: dict[int, Tensor]  # by the number of a vector that it serves: (h, w), how well places fit its text


class ReCoMaker(nn.Module, Made):
    """The vectors, and out of torch's sight the networks."""

    def __init__(self, recipe: ReCo, plan: Plan, device: str):
        super().__init__()
        self.recipe, self.plan, self.device = recipe, plan, device
        paths, options = networks.locate_each(recipe), {"method": recipe.name, "device": device, "dtype": recipe.dtype}
        dino, clip = Dino(paths["backbone"], **options), Clip(paths["clip"], **options)
        self._networks = (dino, clip)
        for name, patch in (("backbone", dino.patch), ("clip", clip.patch)):
            if SIDE % patch:
                text = f"{name} {getattr(recipe, name)!r} has patches of {patch} px, which do not divide {SIDE}"
                raise ValueError(f"{recipe.name}: {text}; choose another")
        texts = clip.texts(
            [*(each.query for each in plan.vectors), *(each.query for each in plan.classes)], recipe.templates
        )
        self._texts = torch.from_numpy(texts).to(device)
        self.register_buffer("vectors", torch.zeros(len(plan.vectors), dino.width, device=device))
        self._counts, self._pictures = [], {}

    def finish(self, samples: Sequence[Sample]) -> None:
        """Make all vectors, contexts first. Raises ValueError for a category that no image is left of."""
        members = ranked(samples, len(self.plan.vectors))
        wanted, seen, done = Counter(chain.from_iterable(members)), {}, 0
        self._counts = [len(each) for each in members]
        with Progress(sum(wanted.values()), lambda: Counts(done, 0)):
            for number, its in enumerate(members):
                if not its:
                    text = f"none of the images of {self.plan.vectors[number].name!r} can be used, see skipped.parquet"
                    raise ValueError(f"{self.recipe.name}: {text}; leave it out with --classes, or add images")
                new = [i for i in its if i not in seen]
                seen |= zip(new, self._look([samples[i] for i in new]), strict=True)
                found = self._made(number, [seen[i] for i in its])
                self.vectors[number] = found.vector
                self._keep_picture(number, samples[its[0]]["image"], found)
                wanted.subtract(its)
                seen = {i: each for i, each in seen.items() if wanted[i]}  # images that serve others too
                done += len(its)

    @torch.inference_mode()
    def _look(self, samples: Sequence[Sample]) -> list[Seen]:
        """What the networks say of images; what one image serves later is found at once."""
        found, (dino, clip) = [], self._networks
        for some in networks.batches(samples, self.device):
            pixels = torch.cat([dino.pixels(each["image"], each["image"].shape[:2], "resize") for each in some])
            features = tokens(dino, pixels)
            dense = clip.dense(pixels) if self.recipe.text_attention else [None] * len(some)
            found += [Seen(f, self._attention(each, d, f)) for each, f, d in zip(some, features, dense, strict=True)]
        return found

    def _attention(self, sample: Sample, dense: Tensor | None, features: Tensor) -> dict[int, Tensor]:
        options = {"size": features.shape[1:], "temperature": self.recipe.text_temperature}
        numbers = [] if dense is None else sample["serves"][:, 0].tolist()
        return {i: language_attention(dense[None], self._texts[i], **options)[0] for i in numbers}

    def _made(self, number: int, images: Sequence[Seen]) -> Found:
        """One vector, out of what the networks say of its images, best first."""
        features = torch.stack([each.features for each in images])
        attention = torch.stack([each.attention[number] for each in images]) if self.recipe.text_attention else None
        contexts = self.vectors[: min(number, len(self.plan.contexts))]
        found = cosegment(features, weights(features, attention, contexts), slices=self.recipe.slices)
        if not (found.vector.isfinite().all() and found.support.isfinite().all()):  # of both networks
            text = f"the features of {self.plan.vectors[number].name!r} are no finite numbers; try --dtype float32"
            raise ValueError(f"{self.recipe.name}: {text}, or other weights")
        return found

    def _keep_picture(self, number: int, image: np.ndarray, found: Found) -> None:
        """Keep the best image of a vector with a frame round its seed, and how much the others support its places."""
        if len(self._pictures) == PICTURES:
            return
        support, patch = found.support[0].cpu().numpy(), self._networks[0].patch
        top, left = (patch * place for place in divmod(int(found.seeds[0]), support.shape[1]))
        framed, inner = image.copy(), np.s_[top : top + patch, left : left + patch]
        framed[max(0, top - FRAME) : top + patch + FRAME, max(0, left - FRAME) : left + patch + FRAME] = RED
        framed[inner] = image[inner]
        shown = (support - support.min()) / (np.ptp(support) or 1)
        self._pictures[self.plan.vectors[number].name] = framed, np.kron(shown, np.ones((patch, patch), np.float32))

    def export(self, folder: Folder) -> None:
        """bank.safetensors and config.json; and for the page the pictures."""
        plan, contexts = self.plan, len(self.plan.contexts)
        vectors, texts = self.vectors.cpu().numpy(), self._texts[len(plan.vectors) :].cpu().numpy()
        made = bank.Bank(vectors[list(plan.places)], texts, vectors[:contexts], self._config())
        for name, content in bank.files(made).items():
            folder.write(content, name)
        record.keep_pictures(folder, {name: image for name, (image, _) in self._pictures.items()})
        record.keep_masks(folder, 0, {name: support for name, (_, support) in self._pictures.items()})

    def _config(self) -> dict:
        recipe, plan, (dino, clip) = self.recipe, self.plan, self._networks
        classes = [
            {"name": each.name, "query": each.query, "images": self._counts[place]}
            for each, place in zip(plan.classes, plan.places, strict=True)
        ]
        return {
            "classes": classes, "contexts": [each.name for each in plan.contexts], "slices": recipe.slices,
            "backbone": recipe.backbone, "backbone_digest": dino.digest(), "clip": recipe.clip,
            "clip_digest": clip.digest(), "text_temperature": float(recipe.text_temperature),
            "templates_digest": digest(read_templates(recipe.templates)), "training": asdict(recipe),
        }  # fmt: skip


def ranked(samples: Sequence[Sample], vectors: int) -> list[list[int]]:
    """The indices of the images of each vector, best first."""
    found = [[] for _ in range(vectors)]
    for i in range(len(samples)):
        for number, rank in samples[i]["serves"].tolist():
            found[number].append((rank, i))
    return [[i for _, i in sorted(its)] for its in found]
