"""CLIP's view of parts of an image: attention kept to a part in the last blocks, less what the whole image attends to.

Zero-guidance segmentation (Rewatbowornwong et al., ICCV 2023, section 3.2 and supplement). What precedes the masked
blocks is computed once for an image; every further block once for each part, all parts of all images together.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from raypipe import networks
from raypipe.features.clip import Clip, normalise

if TYPE_CHECKING:
    from torch import Tensor

TOGETHER = 4 << 30  # bytes of attention on a GPU at once: 33 parts of CLIP-L/14 at 336 px
CACHE = 4 << 20  # bytes of the same on the CPU
MAPS = 6  # of all pairs of tokens in all heads that a part needs at once
TINY = 1e-37  # what is divided by at least


class Seen(NamedTuple):
    """What CLIP makes of S parts, and what led to it in the L masked blocks."""

    embeddings: Tensor  # (S, D) float32
    saliency: Tensor  # (S, L) in [0, 1]: the mean cosine of masked and ordinary attention
    subtracted: Tensor  # (S, L): how much of the whole image's attention is taken away; 0 without subtraction
    rows: Tensor  # (S, L, heads, T): the class token's attention in the end, which may be negative


class _Attention(NamedTuple):
    """The ordinary attention of some heads of one block, in G streams of T tokens."""

    weights: Tensor  # (G, 1, heads, T, T) float32, rows sum to 1
    lengths: Tensor  # (G, 1, heads, T), of rows of `weights`
    values: Tensor  # (G, 1, heads, T, d / heads) float32


class _Look(NamedTuple):
    """How one block looks at S parts: see `Seen`."""

    saliency: Tensor  # (S,)
    subtracted: Tensor  # (S,)
    row: Tensor  # (S, heads, T)


class Masked:
    """Embeddings of parts of images, by a CLIP with a vision transformer."""

    def __init__(self, clip: Clip, *, last: int = 4, sigma2: float | None = 2.5):
        """last: how many of the last blocks are masked, from 0 (all parts look like the whole image) to all of them.

        sigma2: of the weight exp(-(c + 1)^2 / (2 sigma2)) with which the whole image's attention is subtracted, of a
        part with saliency c; None: it is not. Raises ValueError for more blocks than CLIP has, and for a residual one.
        """
        self._vit, self._sigma2 = clip.transformer(), sigma2
        layers = self._vit.layers
        if not 0 <= last <= len(layers):
            expected = f"mask_last_layers must be from 0 to the {len(layers)} blocks of this CLIP"
            raise ValueError(f"{self._vit.method}: {expected}, got {last!r}")
        self._before, self._masked = layers[: len(layers) - last], layers[len(layers) - last :]

    def streams(self, squares: Sequence[np.ndarray]) -> Tensor:
        """All tokens before the masked blocks: (B, T, d), the class token first. squares: of `squashed`, one or more.

        On the CPU no image depends on the others.
        """
        import torch

        device = self._vit.device
        with torch.no_grad():
            batches = networks.batches(squares, device)
            return torch.cat([self._vit.through(planes(batch, device), self._before) for batch in batches])

    def embed(self, streams: Tensor, masks: np.ndarray, of: Sequence[int]) -> Tensor:
        """What CLIP makes of parts: float32 (S, D), not normalised; NaN where the stream is.

        masks: float32 (S, g, g), see `token_masks`. of: the number of each part's stream (those of `streams`), parts of
        one image side by side. On the CPU no part depends on the others.
        """
        import torch

        if not (self._masked and len(masks)):
            with torch.no_grad():
                return self._vit.projected(streams[list(of), 0])
        return torch.cat([embeddings for embeddings, _ in self._embedded(streams, masks, of)])

    def seen(self, streams: Tensor, masks: np.ndarray, of: Sequence[int]) -> Seen:
        """The same for one or more parts and masked blocks, with what led to it."""
        import torch

        embeddings, looks = zip(*self._embedded(streams, masks, of), strict=True)
        blocks = [_joined(block) for block in zip(*looks, strict=True)]
        return Seen(torch.cat(embeddings), *(torch.stack(each, 1) for each in zip(*blocks, strict=True)))

    def _embedded(self, streams: Tensor, masks: np.ndarray, of: Sequence[int]) -> Iterator[tuple[Tensor, list[_Look]]]:
        """The embeddings of some parts after the others, and how each masked block looks at them."""
        import torch

        columns = torch.from_numpy(masks).to(streams.device).flatten(1)
        columns = torch.cat([torch.ones_like(columns[:, :1]), columns], 1)  # the class token is always seen
        shared = functools.lru_cache(1)(lambda image: [*self._attention(self._masked[0], streams[image, None])])
        for batch in self._batches(len(masks), streams):
            with torch.no_grad():
                found = self._through(streams, columns[batch], [of[part] for part in batch], shared)
            yield found

    def _through(self, streams: Tensor, columns: Tensor, of: Sequence[int], shared: Callable) -> tuple[Tensor, list]:
        """Parts through all masked blocks together. columns: (S, T). shared: of an image, the first one's attention."""
        import torch

        unseen = columns.amax(0) == 0  # what no part sees costs next to nothing
        order = unseen.int().argsort(stable=True)  # the class token stays the first
        seen = order[: len(order) - int(unseen.sum())]
        columns = columns.index_select(1, seen)
        first = [
            self._block(0, streams[image, None], columns[None, [*parts]], shared(image), seen)
            for image, parts in itertools.groupby(range(len(of)), key=of.__getitem__)
        ]
        tokens, looks = torch.cat([tokens for tokens, _ in first]), [_joined([look for _, look in first])]
        if len(self._masked) > 1:
            tokens, back = tokens.index_select(1, order), order.argsort()
        for i in range(1, len(self._masked)):
            tokens, look = self._block(i, tokens, columns[:, None])
            looks.append(look._replace(row=look.row.index_select(2, back)))
        return self._vit.projected(tokens[:, 0]), looks

    def _batches(self, parts: int, streams: Tensor) -> Iterator[list[int]]:
        """The numbers of the parts that go through the blocks together: each alone on the CPU."""
        maps = MAPS * 4 * self._masked[0].self_attn.num_heads * streams.shape[1] ** 2
        at_once = max(1, TOGETHER // maps) if streams.is_cuda else 1
        return (list(range(first, min(first + at_once, parts))) for first in range(0, parts, at_once))

    def _attention(self, layer, tokens: Tensor) -> Iterator[_Attention]:
        """Ordinary attention, on the CPU of a few heads at a time, whose maps its caches hold. tokens: (G, T, d)."""
        import torch

        attention = layer.self_attn
        with self._vit.autocast():
            given = layer.layer_norm1(tokens[:, None])
            found = [project(given) for project in (attention.q_proj, attention.k_proj, attention.v_proj)]
        pairs = (each.float().unflatten(-1, (attention.num_heads, -1)).transpose(2, 3) for each in found)
        at_once = attention.num_heads if tokens.is_cuda else max(1, CACHE // (4 * tokens.shape[1] ** 2))
        groups = (each.split(at_once, 2) for each in pairs)
        for queries, keys, values in zip(*groups, strict=True):  # (G, 1, heads, T, d / heads)
            with networks.autocast(self._vit.device, "float32"):
                weights = (queries * attention.scale @ keys.mT).softmax(-1)
            yield _Attention(weights, torch.linalg.vector_norm(weights, dim=-1), values)

    def _block(
        self, index: int, tokens: Tensor, columns: Tensor, known: list | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, _Look]:
        """A masked block: (G * n, T, d), in the last one the class token alone; and how it looks at the parts.

        tokens: (G, T, d). columns: (G, n, seen), by which n parts of each multiply attention. known: that attention.
        seen: the numbers of the tokens that any part sees; None: they are the first ones.
        """
        layer, rows = self._masked[index], tokens.shape[1] if index < len(self._masked) - 1 else 1
        with networks.autocast(self._vit.device, "float32"):
            mixed, look = self._mixed(known or self._attention(layer, tokens), columns[:, :, None, None], rows, seen)
        with self._vit.autocast():
            tokens = (tokens[:, None, :rows] + layer.self_attn.out_proj(mixed)).flatten(0, 1)
            return tokens + layer.mlp(layer.layer_norm2(tokens)), look

    def _mixed(
        self, ordinary: Iterable[_Attention], columns: Tensor, rows: int, seen: Tensor | None
    ) -> tuple[Tensor, _Look]:
        """The values mixed by the first rows of attention: (G, n, rows, d). columns: (G, n, 1, 1, seen)."""
        import torch

        count, of_heads = columns.shape[4], []
        for weights, lengths, values in ordinary:
            if seen is None:  # no copies
                weights_seen, values_seen = weights[..., :count], values[..., :count, :]
            else:
                weights_seen, values_seen = weights.index_select(4, seen), values.index_select(3, seen)
            masked = weights_seen * columns  # (G, n, heads, T, seen), whose cosines do not need its sums
            lengths = (torch.linalg.vector_norm(masked, dim=4) * lengths).clamp_min(TINY)
            saliency = ((masked * weights_seen).sum(4) / lengths).mean(3)
            masked = masked[..., :rows, :]
            sums = masked.sum(4, keepdim=True).clamp_min(TINY)
            mixed, whole = masked @ values_seen / sums, weights[..., :1, :]
            of_heads.append((saliency, mixed, whole @ values, masked[..., :1, :] / sums[..., :1, :], whole))
        saliency, mixed, mixed_by_whole, own, whole = (torch.cat(each, 2) for each in zip(*of_heads, strict=True))
        saliency = saliency.mean(2)  # (G, n)
        subtracted = saliency * 0 if self._sigma2 is None else (-((saliency + 1) ** 2) / (2 * self._sigma2)).exp()
        share = subtracted[..., None, None, None]
        row = -share * whole
        row[..., slice(count) if seen is None else seen] += own
        look = _Look(saliency.flatten(), subtracted.flatten(), row[..., 0, :].flatten(0, 1))
        return (mixed - share * mixed_by_whole).transpose(2, 3).flatten(3), look


def _joined(looks: Sequence[_Look]) -> _Look:
    import torch

    return _Look(*(torch.cat(each) for each in zip(*looks, strict=True)))


def attention(clip: Clip, square: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """What some tokens attend to in every block of the image network: float32 (L, len(tokens), T), rows sum to 1.

    The mean over heads (paper, supplement, figure 10), of the asked rows alone. square: of `squashed`. tokens: 0 is the
    class token, 1 + i patch i, row by row. Raises ValueError for a residual network.
    """
    import torch

    vit, found = clip.transformer(), []
    with torch.no_grad():
        stream = vit.through(planes([square], vit.device), [])
        for layer in vit.layers:
            with vit.autocast():
                given, of = layer.layer_norm1(stream)[0], layer.self_attn
                pairs = of.q_proj(given[list(tokens)]), of.k_proj(given)
                stream = layer(stream, attention_mask=None)
            queries, keys = (each.float().unflatten(-1, (of.num_heads, -1)).transpose(0, 1) for each in pairs)
            with networks.autocast(vit.device, "float32"):
                found.append((queries * of.scale @ keys.mT).softmax(-1).mean(0))
    return torch.stack(found).cpu().numpy()


def planes(squares: Sequence[np.ndarray], device: str) -> Tensor:
    """Squares of `squashed` as the network sees them: float32 (B, 3, size, size) on the device."""
    import torch

    return normalise(torch.from_numpy(np.stack(squares)).to(device).permute(0, 3, 1, 2))


def squashed(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image as a square, bicubic over all that a pixel covers: RGB uint8 (H, W, 3) to (size, size, 3)."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def token_masks(segment_map: np.ndarray, count: int, grid: int) -> np.ndarray:
    """How much of each token's area a segment covers: float32 (count, grid, grid) in [0, 1].

    segment_map: int (h, w), labels 0..count - 1; others belong to no segment. The mask of a union is the sum of masks.
    """
    rows, columns = (_areas(side, grid) for side in segment_map.shape)
    masks = [rows @ (segment_map == i).astype(np.float32) @ columns.T for i in range(count)]
    return np.array(masks, np.float32).reshape(count, grid, grid)


def _areas(side: int, grid: int) -> np.ndarray:
    """What averages `side` pixels to `grid` cells, as adaptive pooling divides them: float32 (grid, side)."""
    cells, pixels = np.arange(grid)[:, None], np.arange(side)
    first, end = cells * side // grid, -(-(cells + 1) * side // grid)
    return ((first <= pixels) & (pixels < end)).astype(np.float32) / (end - first).astype(np.float32)
