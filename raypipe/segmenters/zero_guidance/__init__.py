"""Zero-guidance segmentation: the parts of an image, each named in free text; no classes, no prompt, no training.

Rewatbowornwong, Chatthee, Chuangsuwanich, Suwajanakorn, "Zero-guidance Segmentation Using Zero Segment Labels", ICCV
2023. Here is the method; `tree` joins DINO's keys to a tree and splits it, `parts` moves the edges of the splits to the
image's, `names` finds words for CLIP's embedding of a part (in `vocabulary.txt`, but for those that `blocked.txt`
lists), `captions` writes them with GPT-2, `merging` joins siblings that mean the same, `maps` makes segments of what is
left, and `attention` tells what CLIP looks at meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np

from raypipe import networks
from raypipe.features.grid import resized
from raypipe.segmenters._discovery import is_one_colour
from raypipe.segmenters.zero_guidance import captions, merging, names
from raypipe.segmenters.zero_guidance.maps import arranged, of_regions, segments
from raypipe.segmenters.zero_guidance.merging import Node, Union
from raypipe.segmenters.zero_guidance.names import Name
from raypipe.segmenters.zero_guidance.parts import Grown, Parts, parts
from raypipe.segmenters.zero_guidance.tree import ward
from raypipe.types import BadImage, Segmenter, Segments

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.features.clip_masked import Masked
    from raypipe.segmenters.zero_guidance.attention import Looks

LONGEST = 2  # short sides of what DINO sees with `keep_aspect`, longer ones are squeezed: a tree costs its keys squared
MOST = 256  # keys a side: a tree of 65,536 takes minutes, one of many more has no end
OF_GRID = ("size", "stride", "keep_aspect")
OF_SPLITTING = ("t_dino", "num_parts", "max_segments", "splits", "force_root_split")
OF_NAMES = ("mask_last_layers", "subtract", "sigma2", "vocabulary", "block", "below")
OF_MERGING = ("merge", "tau_merge", "merge_mode", "alpha")
OF_LOOKS = ("weights", "clip_model", "dtype")  # weights may be the folder of all
OF_SEARCH = ("beam_size", "max_new_tokens", "steps", "top_k_texts", "ce_scale", "end_factor", "forbidden")
ALPHAS = {"image": 1.0, "text": 0.0}  # of the ways to merge that have no other
# operations: of DINO's ViT-S for two keys, of CLIP-L/14's for a block, and for a text of the search
PAIR, BLOCK, TEXT = 2e4, 2e10, 5e8
SLOW = 1e10  # operations per second of a busy CPU core


class Leaves(NamedTuple):
    """The parts of an image and what CLIP makes of them."""

    parts: Parts
    stream: Tensor | None  # (T, d) on the device: the image before the masked blocks; None without parts
    tokens: np.ndarray  # float32 (K, g, g): how much of each of CLIP's tokens a part covers
    embeddings: np.ndarray  # float32 (K, D), not normalised
    names: list[Name]


@dataclass
class ZeroGuidance(Segmenter):
    """One mask for each part of the image, named in free text; together they are the whole image, the largest first.

    The score is the cosine of CLIP's embeddings of part and name: 0.2 to 0.3 is usual. Notes: `one_segment`, it is the
    whole image; `many_segments`, there were more parts than `max_segments`; `label_blocked:WORD`, a name
    was not taken because of WORD; `no_candidate`, the search wrote nothing that can be a name; `too_small`, the image
    is a pixel, or smaller than one of DINO's patches: it is one segment.
    """

    weights: str = "facebook/dino-vits8"  # the DINO whose keys make the parts: a Hugging Face id, URL, folder or file
    clip_model: str = "openai/clip-vit-large-patch14-336"  # the CLIP that parts and names are compared by: id or folder
    lm: str = "openai-community/gpt2-medium"  # the GPT-2 that writes names with naming zerocap: id or folder
    # given:DIR with class maps: these regions are named as they are, in the place of DINO's parts; 0 and 255 (of
    # 16 bits 65535) are none
    regions: str | None = None
    # px of the square that DINO sees and that is cut into parts: 111 x 111 keys (supplement); in the released code 224,
    # with stride 2 and keep_aspect
    size: int = 448
    stride: int = 4  # px from one key to the next; half is 16 times the work
    keep_aspect: bool = False  # size is that of the shorter side, and the image is not squeezed to a square
    t_dino: float = 0.9  # siblings in the tree that are more alike stay together (supplement; 0.5 to 0.95)
    num_parts: int | None = 20  # that the tree is cut into before that; None = the whole tree (supplement)
    max_segments: int = 64  # the most parts without num_parts
    # which splits of the tree are looked at; the released code: the first half
    splits: Literal["all", "first_half"] = "all"
    force_root_split: bool = False  # two parts at least, as in the released code
    mask_last_layers: int = 4  # of CLIP, whose attention is kept to the part (paper); 0 = all parts look alike
    subtract: bool = True  # what the whole image attends to is taken away
    sigma2: float = 2.5  # how fast that fades for parts that CLIP looks at anyway (supplement; 0.5 to 5)
    # where names come from: the nearest word of the vocabulary; the paper's search, minutes a name without a GPU; or
    # the search where no word is near
    naming: Literal["retrieval", "zerocap", "retrieval+zerocap"] = "retrieval"
    vocabulary: str = "default"  # common nouns; or a data set's list, or a file with a word or phrase per line
    block: str = "default"  # what must not be said of people; none; or a file with a word or phrase per line
    below: float = 0.25  # the cosine of the nearest word under which retrieval+zerocap searches
    beam_size: int = 5  # texts that the search keeps (ZeroCap)
    max_new_tokens: int = 15  # the most tokens of a text of the search (ZeroCap)
    steps: int = 5  # of the search's gradient descent, for each token (ZeroCap)
    top_k_texts: int = 512  # that the search has CLIP look at, for each text and step (ZeroCap)
    ce_scale: float = 0.2  # the weight of what GPT-2 finds fluent beside what CLIP sees (ZeroCap)
    end_factor: float = 1.1  # above 1 the search ends texts sooner (released code; ZeroCap: 1.01)
    # tokens that the search avoids: digits, signs and capitals; none; or those in which a regular expression is found
    forbidden: str = "default"
    merge: bool = True  # join siblings that mean the same; no: all parts are segments
    tau_merge: float = 0.8  # siblings at least as alike become one (paper; 0.6 to 0.95)
    merge_mode: Literal["mix", "image", "text"] = "mix"  # by the cosine of embeddings, of names, or of both
    alpha: float = 0.5  # the weight of embeddings in the mix
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the networks; auto = bfloat16 on a GPU

    source = "Rewatbowornwong, Chatthee, Chuangsuwanich, Suwajanakorn, ICCV 2023"
    licence = "Apache-2.0 (DINO), MIT (CLIP, GPT-2)"
    networks = ("weights", "clip_model", "lm")
    licences = {"weights": "Apache-2.0", "clip_model": "MIT", "lm": "MIT"}
    model_types = {"clip_model": "clip", "lm": "gpt2"}
    needs = (
        "facebook/dino-vits8 and openai/clip-vit-large-patch14-336, 1.8 GB, and with --naming zerocap "
        "openai-community/gpt2-medium, 1.5 GB: fetched on the first run, or by `raypipe weights zero_guidance`"
    )
    caution = names.CAUTION
    exclusive = embeds = takes_regions = True
    across = "object"
    gpus = 1.0
    batch_size = 8
    # what is computed in turn, and which options matter only after it
    stages: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "trees": (*OF_SPLITTING, *OF_NAMES, *OF_MERGING),
        "parts_of": (*OF_NAMES, *OF_MERGING),
        "leaves": OF_MERGING,
    }

    def __post_init__(self):
        searches = self.naming != "retrieval"
        self.networks = ("weights", "clip_model", *["lm"] * searches)
        networks.settle_options(self)
        if self.regions:
            self.networks = self.networks[1:]  # nobody asks DINO
        if searches:
            self.batch_size = 2  # whose beams fill a GPU; an interrupted run does whole batches again
        self.vocabulary, self.block = names.settle(self.vocabulary, self.block)
        self._check_ranges()
        self._check_effects()

    def _check_ranges(self) -> None:
        """Raise ValueError for a number that makes no sense."""
        least = {"size": 32, "stride": 1, "num_parts": 2, "max_segments": 2, "mask_last_layers": 0}
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise ValueError(f"zero_guidance: {name} must be at least {bound}, got {value!r}")
        if self.size > MOST * self.stride:
            text = f"size must be at most {MOST} times stride, which is {self.stride}, got {self.size}"
            raise ValueError(f"zero_guidance: {text}; make stride larger")
        captions.check_options(self, method=self.name)
        for name in ("t_dino", "tau_merge", "below"):
            if not -1 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"zero_guidance: {name} is a cosine and must be between -1 and 1, got {value!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"zero_guidance: alpha must be between 0 and 1, got {self.alpha!r}")
        if not 0 < self.sigma2 < np.inf:
            raise ValueError(f"zero_guidance: sigma2 must be above 0, got {self.sigma2!r}")

    def _check_effects(self) -> None:
        """Raise ValueError for an option that was set and has no effect beside the others, or that is not there."""
        for is_idle, options, reason in (
            (self.regions, (*OF_GRID, *OF_SPLITTING, *OF_MERGING), "with regions: they are the segments"),
            (self.num_parts, ("max_segments",), "with num_parts; add --num-parts None"),
            (not self.num_parts, ("splits",), "without num_parts"),
            (not self.mask_last_layers, ("subtract", "sigma2"), "without masked layers"),
            (not self.subtract, ("sigma2",), "without subtract"),
            (self.naming == "retrieval", ("lm", *OF_SEARCH), "with naming 'retrieval', which does not search"),
            (self.naming != "retrieval+zerocap", ("below",), "unless naming is 'retrieval+zerocap'"),
            (not self.merge, OF_MERGING[1:], "without merge"),
            (self.merge_mode != "mix", ("alpha",), "unless merge_mode is 'mix'"),
        ):
            for name in options if is_idle else ():
                if (value := getattr(self, name)) != _DEFAULTS[name]:
                    raise ValueError(f"zero_guidance: {name} {value!r} has no effect {reason}")

    @property
    def timeout(self) -> float:
        """Seconds for one image on a busy CPU core: ten minutes, and what the options make of it."""
        keys = (self.size // self.stride) ** 2 * (LONGEST if self.keep_aspect else 1)
        texts = (
            self.top_k_texts * self.beam_size * self.max_new_tokens * self.steps if self.naming != "retrieval" else 0
        )
        named = 2 * (self.num_parts or self.max_segments)  # parts and parents
        return 600 + (keys**2 * PAIR + named * (self.mask_last_layers * BLOCK + texts * TEXT)) / SLOW

    def untiled(self) -> str:
        return "which names given regions as they are, and tiles would cut them" if self.regions else ""

    def load(self, device: str) -> None:
        from raypipe.features.clip import Clip
        from raypipe.features.dino import Dino

        networks.keep_products_exact(device)
        self._device, self._paths, self._captions = device, networks.locate_each(self), None
        options = {"method": self.name, "device": device, "dtype": self.dtype}
        self._dino = None if self.regions else Dino(self._paths["weights"], stride=self.stride, **options)
        self._clip = Clip(self._paths["clip_model"], **options)
        self._masked()  # what it cannot give fails here, once
        if self.naming != "retrieval":
            search = {name: getattr(self, name) for name in OF_SEARCH}
            self._captions = captions.ZeroCap(self._paths["lm"], self._clip, **options, **search)

    def checksums(self) -> dict[str, str]:
        return networks.checksums_of_each(self._paths)

    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[Segments]:
        """See `Segmenter.segment`. foregrounds: with `regions`, int (H, W), one per image."""
        for some in networks.batches(range(len(images)), self._device):
            batch = [images[i] for i in some]
            given = [of_regions(foregrounds[i]) for i in some] if self.regions else None
            leaves = list(self._leaves(batch, given) if self.regions else self.leaves(batch))
            for image, each, nodes in zip(batch, leaves, self._merged(leaves), strict=True):
                yield segments(each.parts, nodes, image.shape[:2])

    def explain(
        self, image: np.ndarray, point: tuple[int, int], *, segment: int | Literal["point"] | None, device: str
    ) -> Looks:
        """What CLIP looks at from a point (x, y) of an image and, with a segment, in the masked blocks.

        segment: its number, or point: that at the point. Needs no `load`. Raises ValueError for a number that is none,
        and for options without effect; BadImage as `segment` does.
        """
        from raypipe.features.clip import Clip
        from raypipe.segmenters.zero_guidance import attention

        if segment is None:
            for name, default in _DEFAULTS.items():
                if name not in OF_LOOKS and getattr(self, name) != default:
                    raise ValueError(f"zero_guidance: {name} has no effect without a segment; add --segment point")
            path = networks.locate(self.clip_model, method=self.name)
            clip = Clip(path, method=self.name, device=device, dtype=self.dtype, text=False)
            return attention.from_point(clip, image, point)
        if self.regions or not self.mask_last_layers:
            reason = "with regions" if self.regions else "without masked layers"
            raise ValueError(f"zero_guidance: a segment has nothing to show {reason}")
        self.load(device)
        leaves = [*self.leaves([image])]
        (left,) = self._merged(leaves)
        index, ids = arranged(leaves[0].parts, left, image.shape[:2])
        number = int(index[point[::-1]]) if segment == "point" else segment
        if number >= len(ids):
            known = ", ".join(f"{i} {left[tree_id].name.text!r}" for i, tree_id in enumerate(ids))
            raise ValueError(f"zero_guidance: there is no segment {number}; the image has {known}")
        node = left[ids[number]]
        tokens = leaves[0].tokens[[*node.leaves]].sum(0).clip(max=1)
        rows = self._masked().seen(leaves[0].stream[None], tokens[None], [0]).rows[0, ..., 1:].mean(1)
        chosen = attention.Chosen(
            number, node.name.text, node.name.score, index == number, rows.unflatten(1, tokens.shape).cpu().numpy()
        )
        return attention.from_point(self._clip, image, point)._replace(chosen=chosen)

    def trees(self, images: Sequence[np.ndarray]) -> Iterator[Grown]:
        """The tree of each image's keys, in order. Raises BadImage where DINO gives no finite numbers."""
        notes = [self._of_one_part(image) for image in images]
        seen = [resized(image, self.seen_size(image.shape[:2])) for image in images]
        several = [image for image, note in zip(seen, notes, strict=True) if note is None]
        features = iter([*self._dino(several, fit="free", max_side=LONGEST * self.size)])  # all of DINO before the rest
        for image, note in zip(seen, notes, strict=True):
            rows, grid = np.ones((1, 1), np.float32), (1, 1)
            if note is None:
                keys, grid = (found := next(features)).patches, found.grid
                rows = (keys / keys.norm(dim=1, keepdim=True).clamp_min(merging.TINY)).cpu().numpy()
            yield Grown(image, rows, grid, ward(rows, device=self._device), note or "")

    def parts_of(self, images: Sequence[np.ndarray]) -> Iterator[Parts]:
        """The parts of each image, in order. Raises BadImage as `trees` does."""
        options = {name: getattr(self, name) for name in OF_SPLITTING}
        return (parts(grown, device=self._device, **options) for grown in self.trees(images))

    def seen_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) in px of an image as DINO sees it. size: its own."""
        if not self.keep_aspect:
            return self.size, self.size
        return tuple(min(round(side * self.size / min(size)), LONGEST * self.size) for side in size)

    def _of_one_part(self, image: np.ndarray) -> str | None:
        """What there is to note of an image that is a single part; None where it may have more."""
        if max(image.shape[:2]) < self._dino.patch or image.shape[:2] == (1, 1):
            return "too_small"
        return "" if is_one_colour(image) else None

    def leaves(self, images: Sequence[np.ndarray]) -> Iterator[Leaves]:
        """The parts of each image with embeddings and names, in order: what is merged."""
        return self._leaves(images, list(self.parts_of(images)))

    def _leaves(self, images: Sequence[np.ndarray], found: Sequence[Parts]) -> Iterator[Leaves]:
        """As `leaves`, of parts that are there: those of all images go through CLIP together."""
        from raypipe.features.clip_masked import squashed, token_masks

        grid = self._clip.size // self._clip.patch
        tokens = [token_masks(each.segment_map, len(each.tree_ids), grid) for each in found]
        squares = [squashed(im, self._clip.size) for im, each in zip(images, found, strict=True) if each.tree_ids]
        seen = iter(self._masked().streams(squares) if squares else ())
        streams = [next(seen) if each.tree_ids else None for each in found]
        embeddings, named = self._named(streams, [(i, mask) for i, masks in enumerate(tokens) for mask in masks])
        end = 0
        for each, stream, masks in zip(found, streams, tokens, strict=True):
            own = slice(end, end := end + len(masks))
            yield Leaves(each, stream, masks, embeddings[own], named[own])

    def _named(self, streams: Sequence, found: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, list[Name]]:
        """Embeddings, float32 (S, D), and names. found: of each, the number of its stream and its token mask."""
        import torch

        if not found:
            return np.zeros((0, self._clip.width), np.float32), []
        used = sorted({i for i, _ in found})
        of, masks = [used.index(i) for i, _ in found], np.stack([mask for _, mask in found])
        embeddings = self._masked().embed(torch.stack([streams[i] for i in used]), masks, of).cpu().numpy()
        if not np.isfinite(embeddings).all():
            text = "CLIP gives embeddings that are no finite numbers; try --dtype float32, or other weights"
            raise BadImage("segment", "non_finite", text)
        return embeddings, self._namer(embeddings)

    def _masked(self) -> Masked:
        from raypipe.features.clip_masked import Masked

        return Masked(self._clip, last=self.mask_last_layers, sigma2=self.sigma2 if self.subtract else None)

    @functools.cached_property
    def _namer(self) -> names.Namer:
        options = {name: getattr(self, name) for name in ("naming", "vocabulary", "block", "below")}
        return names.Namer(self._clip, captions=self._captions, **options)

    def _merged(self, images: Sequence[Leaves]) -> list[dict[int, Node]]:
        """What is left of the parts of each image, by tree id, once siblings are joined."""

        def parents(unions: list[Union]) -> list[Node]:
            masks = [(i, images[i].tokens[[*leaves]].sum(0).clip(max=1)) for i, leaves in unions]
            return nodes([leaves for _, leaves in unions], *self._named([each.stream for each in images], masks))

        found = []
        for each in images:
            alone = nodes([(i,) for i in range(len(each.names))], each.embeddings, each.names)
            found.append(dict(zip(each.parts.tree_ids, alone, strict=True)))
        if self.regions or not self.merge:
            return found
        return merging.merged(found, parents, tau=self.tau_merge, alpha=ALPHAS.get(self.merge_mode, self.alpha))


def nodes(leaves: Sequence[tuple[int, ...]], embeddings: np.ndarray, named: Sequence[Name]) -> list[Node]:
    """Parts as they are merged: of each its leaves, embedding and name."""
    return [Node(*each, name.vector, name) for *each, name in zip(leaves, embeddings, named, strict=True)]


_DEFAULTS = {field.name: field.default for field in fields(ZeroGuidance)}
SEGMENTER = ZeroGuidance
