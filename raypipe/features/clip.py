"""CLIP: what texts and images have in common (Radford et al., ICML 2021), for whole images and for every patch.

Texts are asked in many contexts whose answers are averaged. Dense features are read along the value path of the last
layer (Zhou et al., ECCV 2022): without its attention each patch keeps what is its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from raypipe import networks
from raypipe.lookup import json_list, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.features.clip_vit import Vit

log = logging.getLogger("raypipe")
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], by which every CLIP was trained
STD = (0.26862954, 0.26130258, 0.27577711)
TEMPLATES = Path(__file__).with_name("templates.txt")  # 85 contexts, of the kinds that CLIP's and NamedMask's have
TINY = 1e-8  # the shortest vector that is divided by its length (MaskCLIP)
LONGEST = 20  # sides of its square that a prepared image is long at most; archives reject longer ones
TEXTS = 128  # that are read at once; all are padded to the longest
_TEXTS: dict[tuple[str, str, str], np.ndarray] = {}  # rows of `texts` by text network, templates and query


class Clip:
    """A frozen CLIP: with a vision transformer (`clip_vit`) or, in a folder of open_clip, a residual one."""

    def __init__(
        self, path: Path, *, method: str, device: str, dtype: str = "auto", vision: bool = True, text: bool = True,
        literal: bool = False,
    ):  # fmt: skip
        """Read a CLIP of any size.

        path: a folder of `networks.locate`, as transformers saves a CLIPModel and its tokenizer. method: whose errors
        these are. dtype: of the image network, see `networks.autocast`; texts are read in float32. vision, text:
        whether that half is needed. literal: images are read as MaskCLIP's released code does, with the exact GELU and
        another constant in every LayerNorm than the network was trained with. Raises ValueError for other weights, and
        for no complete tokenizer where texts are needed.
        """
        options = {"method": method, "device": device, "dtype": dtype, "vision": vision, "text": text}
        if (path / networks.OPEN_CLIP).is_file():
            from raypipe.features.clip_resnet import Resnet as Network
        else:
            from raypipe.features.clip_vit import Vit as Network
        self._path, self._method, self._device = path, method, device
        self._network = Network(path, literal=literal, **options)
        self.width, self.patch, self.size = self._network.width, self._network.patch, self._network.size

    def texts(self, queries: Sequence[str], templates: str = "default") -> np.ndarray:
        """What CLIP makes of each query: float32 (C, D), rows of length 1.

        queries: texts as they are; each takes the place of `{}` in every template (see `read_templates`). A row is the
        mean of the normalised answers, normalised. Found once in a process for each query. Raises ValueError for a
        query without a single token, and for weights that give no finite numbers.
        """
        patterns = read_templates(templates)
        of_all = self._network.digest_of_texts, digest(patterns)
        missing = [query for query in dict.fromkeys(queries) if (*of_all, query) not in _TEXTS]
        missing.sort(key=len)  # texts of like length need little padding
        step = max(1, TEXTS // len(patterns))
        for some in (missing[first : first + step] for first in range(0, len(missing), step)):
            tokens = [self.tokens([pattern.replace("{}", query) for pattern in patterns], query) for query in some]
            for query, row in zip(some, self._mean_rows(tokens), strict=True):
                if not np.isfinite(row).all():
                    text = f"CLIP makes no finite numbers of the text {query!r}; use other weights"
                    raise ValueError(f"{self._method}: {text}")
                _TEXTS[*of_all, query] = row
        return np.stack([_TEXTS[*of_all, query] for query in queries])

    def _mean_rows(self, tokens: Sequence[list[list[int]]]) -> np.ndarray:
        """For each query's texts, of their tokens, the mean of their features: float32 (C, D), all of length 1."""
        import torch

        with torch.no_grad():
            features = _unit(self._network.of_tokens([ids for texts in tokens for ids in texts]))
            return _unit(features.unflatten(0, (len(tokens), -1)).mean(1)).cpu().numpy()

    def text_features(self, texts: Sequence[str], query: str = "") -> Tensor:
        """CLIP's features of texts as they are, not normalised: float32 (n, D). query: what they are about."""
        import torch

        with torch.no_grad():
            return self._network.of_tokens(self.tokens(texts, query))

    def tokens(self, texts: Sequence[str], query: str = "") -> list[list[int]]:
        """The numbers of each text's tokens, start and end included, cut to what the network reads.

        A cut is said in the log. Raises ValueError for a query, or a text, in which the tokenizer finds nothing.
        """
        words, most, query = self._network.tokenizer, self._network.context, query or texts[0]
        asked, *found = words([query, *texts])["input_ids"]
        if not set(asked) - set(words.all_special_ids):
            raise ValueError(f"{self._method}: the tokenizer finds nothing in the text {query!r}; change it")
        if (longest := max(map(len, found))) > most:
            text = "%s: %r makes a text of %d tokens, of which %d are read: its end is cut"
            log.warning(text, self._method, query, longest, most)
        return [ids if len(ids) <= most else [*ids[: most - 1], words.eos_token_id] for ids in found]

    def embed(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """What CLIP makes of whole images: float32 (B, D), rows of length 1. images: RGB uint8 (H, W, 3)."""
        return self.embed_prepared([self.prepared(image) for image in images])

    def prepared(self, image: np.ndarray) -> np.ndarray:
        """The square that CLIP sees of an image: uint8 (size, size, 3). Needs no GPU. See `prepare`."""
        return prepare(image, self.size)

    def embed_prepared(self, squares: Sequence[np.ndarray]) -> np.ndarray:
        """As `embed`, of squares of `prepared`. On the CPU no row depends on the squares beside it."""
        import torch

        rows = [np.empty((0, self.width), np.float32)]
        for batch in networks.batches(squares, self._device):
            planes = torch.from_numpy(np.stack(batch)).to(self._device).permute(0, 3, 1, 2)
            with torch.no_grad():
                rows.append(_unit(self._network.of_pixels(normalise(planes))).cpu().numpy())
        return np.concatenate(rows)

    def dense(self, pixels: Tensor, *, residual: Literal["full", "plain"] = "full", keys: bool = False):
        """Features of every patch along the value path of the last layer: float32 (B, D, h, w), not normalised.

        pixels: float32 (B, 3, H, W) on the device, see `normalise`; both sides multiples of `patch`. residual: full, as
        MaskCLIP's code has it, or plain, as its paper describes it. keys: gives a pair with float32 (B, d, h, w), the
        keys of the last layer through its output projection.
        """
        features, found = self._network.dense(pixels, residual=residual, keys=keys)
        return (features, found) if keys else features

    def transformer(self) -> Vit:
        """Its network, for what only vision transformers have. Raises ValueError for a residual one."""
        from raypipe.features.clip_vit import Vit

        if not isinstance(self._network, Vit):
            text = f"{self._path} holds a CLIP with a residual network, expected one with a vision transformer"
            raise ValueError(f"{self._method}: {text}, such as openai/clip-vit-large-patch14-336")
        return self._network

    def digest(self) -> str:
        """sha256 of the tensors of both halves, whichever are there: the same of every file that holds this CLIP."""
        return self._network.digest()


def normalise(images: Tensor, statistics: Literal["clip", "imagenet"] = "clip") -> Tensor:
    """Images as a network sees them: float32, of mean 0 and deviation 1 over the images that it was trained on.

    images: RGB (B, 3, H, W), uint8, or float in 0..255 after resizing. statistics: whose mean and deviation; CLIP was
    trained with its own, MaskCLIP's configurations have ImageNet's.
    """
    import torch

    both = {"clip": (MEAN, STD), "imagenet": (networks.IMAGENET_MEAN, networks.IMAGENET_STD)}[statistics]
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in both)
    return (images.float() / 255 - mean) / std


def prepare(image: np.ndarray, size: int) -> np.ndarray:
    """The middle square of an image whose shorter side becomes `size`, as CLIP's own preparation does it with Pillow.

    image: RGB uint8 (H, W, 3). Returns uint8 (size, size, 3), bicubic over all that a pixel covers. Strips lose their
    ends first: 1 x 10,000 px would become 336 x 3,360,000.
    """
    from PIL import Image

    short = min(image.shape[:2])
    cut = [slice(max(0, (side - LONGEST * short) // 2), (side + LONGEST * short) // 2) for side in image.shape[:2]]
    image = image[*cut]
    height, width = (size if side == short else int(size * side / short) for side in image.shape[:2])
    whole = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return np.asarray(whole.crop((left, top, left + size, top + size)))


def read_templates(text: str) -> tuple[str, ...]:
    """The contexts in which queries are asked, each with `{}` where the query goes.

    text: `default`, the 85 of this package; `none`, the bare query; a local file with one per line; or a JSON list of
    them. Raises FileNotFoundError and ValueError where there are none.
    """
    if text == "none":
        return ("{}",)
    if text.startswith("["):
        found = json_list(text, option="templates")
    else:
        file = TEMPLATES if text == "default" else Path(text).expanduser()
        try:
            found = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except FileNotFoundError as error:
            expected = "expected default, none, or a file with one per line"
            raise FileNotFoundError(f"templates: there is no file {text!r}; {expected}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"templates: {text} cannot be read as a text ({one_line(error)})") from error
    wrong = next((line for line in found if "{}" not in line), "nothing" if not found else None)
    if wrong is not None:
        raise ValueError(f"templates: every line must have {{}} where the query goes, got {wrong!r}")
    return tuple(found)


def settle_templates(text: str) -> str:
    """The same templates without any file: `default` and `none` stay, all else becomes a JSON list."""
    return text if text in ("default", "none") else json.dumps(read_templates(text), ensure_ascii=False)


def digest(templates: Sequence[str]) -> str:
    """sha256 of templates, by which a run tells whether it asked in the same words."""
    return hashlib.sha256("\n".join(templates).encode()).hexdigest()


def _unit(rows: Tensor) -> Tensor:
    """Rows (..., D) at length 1."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(TINY)
