"""Many texts that begin alike, through CLIP's text network: what the beginning says is computed once for all of them.

The network is causal, no token sees those behind it. So the keys and values of a beginning's tokens are those of every
text whose first tokens are the same, and of each text only the tokens behind these are asked, and its end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from raypipe import networks
from raypipe.features.clip import Clip
from raypipe.features.clip_vit import Vit

if TYPE_CHECKING:
    from torch import Tensor

# Texts are asked in blocks with one beginning, of so many texts, so many blocks at once, both filled up: the same
# products of matrices whatever is asked, so that no text's numbers depend on those beside it.
BLOCKS = {"cpu": (1, 16), "cuda": (16, 64)}
ROOMS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # tokens of each text that a block has room for
KEPT = 160  # beginnings that are remembered, with the texts asked behind them: of ViT-L/14 about 3 MB each

Ids = tuple[int, ...]  # all tokens of a text, start and end included


@dataclass
class _Beginning:
    ids: Ids  # without the end
    past: Tensor | None = None  # keys and values of each layer in turns: (2 L, heads, P, head_dim)
    rows: dict[Ids, int] = field(default_factory=dict)  # where in `vectors` a text is
    vectors: Tensor | None = None  # float32 (n, D), of length 1


class _Block(NamedTuple):
    beginning: _Beginning
    shared: int  # tokens of the beginning with which its texts begin
    texts: list[Ids]


class Continuations:
    """CLIP's embeddings of many texts with few beginnings."""

    def __init__(self, clip: Clip, *, method: str, device: str, dtype: str = "auto", pinned: str = ""):
        """Ask a CLIP with a vision transformer, read with its texts.

        method: whose errors these are. dtype: see `networks.autocast`. pinned: a beginning that is never forgotten.
        Raises ValueError for another CLIP.
        """
        vit = clip._network
        if not isinstance(vit, Vit):
            text = "texts that begin alike are asked of CLIPs with vision transformers, as transformers saves them"
            raise ValueError(f"{method}: {text}; choose other weights")
        self._words, self._most = vit.tokenizer, vit.context
        self._text, self._projection = vit._network.text_model, vit._network.text_projection
        self._method, self._device, self._dtype, self._pinned = method, device, dtype, pinned
        self._begun: dict[str, _Beginning] = {}  # the last one used is the last
        self.encoded = 0  # tokens that went through the network so far, those that fill up included

    def embed(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[Tensor]:
        """What CLIP makes of texts: for each beginning float32 (n, D), rows of length 1.

        asked: beginnings, each with what follows it in n texts. A text is asked once while its beginning is remembered,
        all at once on a GPU. Longer ones than the network reads lose their ends. Raises ValueError for weights that
        give no finite numbers.
        """
        import torch

        begun = self._remembered([beginning for beginning, _ in asked])
        ids = iter(self._tokens([beginning + each for beginning, texts in asked for each in texts]))
        texts = [[next(ids) for _ in each] for _, each in asked]
        with torch.no_grad():
            self._ask([(one, each) for one, its in zip(begun, texts, strict=True) for each in its])
        rows = [[one.rows[each] for each in its] for one, its in zip(begun, texts, strict=True)]
        none = torch.empty(0, self._projection.out_features, device=self._device)
        return [none if one.vectors is None else one.vectors[its] for one, its in zip(begun, rows, strict=True)]

    def _remembered(self, texts: Sequence[str]) -> list[_Beginning]:
        for text in dict.fromkeys(texts):
            self._begun[text] = self._begun.pop(text, None) or _Beginning(self._tokens([text])[0][:-1])
        found = [self._begun[text] for text in texts]
        for text in [text for text in self._begun if text != self._pinned][: max(0, len(self._begun) - KEPT)]:
            del self._begun[text]
        return found

    def _tokens(self, texts: list[str]) -> list[Ids]:
        """The tokens of each text up to its first end, which is where CLIP reads it."""
        end, most = self._words.eos_token_id, self._most
        found = self._words(texts, return_attention_mask=False)["input_ids"] if texts else []
        return [(*ids[: min(ids.index(end), most - 1)], end) for ids in found]

    def _ask(self, pairs: Sequence[tuple[_Beginning, Ids]]) -> None:
        """Have each beginning know these texts."""
        groups = defaultdict(dict)  # of what a block may hold together; each text once
        for beginning, ids in pairs:
            if ids not in beginning.rows:
                shared = _shared(beginning.ids, ids)
                room = next((room for room in ROOMS if room >= len(ids) - shared), self._most)
                groups[room, shared, id(beginning)][ids] = beginning
        at_once, size = BLOCKS[self._device]
        blocks = defaultdict(list)  # by room
        for (room, shared, _), texts in groups.items():
            beginning, ids = next(iter(texts.values())), [*texts]
            starts = range(0, len(ids), size)
            blocks[room] += [_Block(beginning, shared, ids[start : start + size]) for start in starts]
        self._begin([block.beginning for each in blocks.values() for block in each])
        for room, each in blocks.items():
            for start in range(0, len(each), at_once):
                batch = each[start : start + at_once]
                for block, vectors in zip(batch, self._through(batch, room), strict=False):
                    _learn(block, vectors)

    def _begin(self, beginnings: Sequence[_Beginning]) -> None:
        """Find the keys and values of beginnings that have none yet."""
        import torch

        absent = [*{id(each): each for each in beginnings if each.past is None}.values()]
        step = BLOCKS[self._device][0]
        for start in range(0, len(absent), step):
            batch = absent[start : start + step]
            room = len(batch[0].ids) if self._device == "cpu" else self._most
            ids = torch.tensor([_filled([_filled(each.ids, room) for each in batch], step)], device=self._device)
            _, past = self._layers(ids, torch.zeros(1, dtype=torch.long, device=self._device))
            for i, each in enumerate(batch):
                each.past = past[:, 0, :, i, : len(each.ids)].clone()

    def _through(self, blocks: Sequence[_Block], room: int) -> Tensor:
        """The vectors of blocks of texts, and of what fills them up: float32 (blocks, texts, D)."""
        import torch

        at_once, size = BLOCKS[self._device]
        blocks = _filled(blocks, at_once)
        longest = blocks[0].shared if self._device == "cpu" else self._most
        heads, _, depth = blocks[0].beginning.past.shape[1:]
        past = torch.zeros(2 * len(self._text.encoder.layers), at_once, heads, longest, depth, device=self._device)
        for i, block in enumerate(blocks):
            past[:, i, :, : block.shared] = block.beginning.past[:, :, : block.shared]
        texts = [[each[block.shared :] for each in _filled(block.texts, size)] for block in blocks]
        ids = torch.tensor([[_filled(each, room) for each in block] for block in texts], device=self._device)
        ends = torch.tensor([[len(each) - 1 for each in block] for block in texts], device=self._device)
        shared = torch.tensor([block.shared for block in blocks], device=self._device)
        states, _ = self._layers(ids, shared, past)
        with networks.autocast(self._device, "float32"):
            last = states.gather(2, ends[..., None, None].expand(-1, -1, 1, states.shape[-1]))[:, :, 0].float()
            vectors = self._projection(self._text.final_layer_norm(last))
            vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        if not vectors.isfinite().all():
            raise ValueError(f"{self._method}: CLIP makes no finite numbers of a text; use other weights")
        return vectors

    def _layers(self, ids: Tensor, shared: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens of blocks of texts behind all layers: (N, R, t, d), and their keys and values (2 L, N, h, R, t, e).

        ids: int64 (N, R, t). shared: int64 (N,), the tokens before them. past: their keys and values, (2 L, N, h, P, e)
        with P >= shared.
        """
        import torch

        room, found, embeddings = ids.shape[2], [], self._text.embeddings
        self.encoded += ids.numel()
        positions = (shared[:, None] + torch.arange(room, device=ids.device)).clamp_max(self._most - 1)
        own = torch.full((room, room), -torch.inf, device=ids.device).triu(1)
        hidden = None
        if past is not None:
            columns = torch.arange(past.shape[3], device=ids.device)
            hidden = torch.where(columns < shared[:, None], 0.0, -torch.inf)[:, None, None, None]  # (N, 1, 1, 1, P)
        states = embeddings.token_embedding(ids) + embeddings.position_embedding(positions)[:, None]
        with networks.autocast(self._device, self._dtype):
            for i, layer in enumerate(self._text.encoder.layers):
                before = None if past is None else (*past[2 * i : 2 * i + 2], hidden)
                seen, *kept = _attend(layer.self_attn, layer.layer_norm1(states), own, before)
                states = states + seen
                states = states + layer.mlp(layer.layer_norm2(states))
                found += kept
        return states, torch.stack(found)


def _attend(attention, given: Tensor, own: Tensor, before: tuple[Tensor, Tensor, Tensor] | None) -> list[Tensor]:
    """What tokens (N, R, t, d) see of themselves and of those before; with their keys and values, (N, h, R, t, e).

    own: (t, t), added. before: keys and values (N, h, P, e), and what is added to their part, (N, 1, 1, 1, P).
    """
    import torch

    size = given.shape[:3]
    split = [each(given).unflatten(-1, (attention.num_heads, -1)) for each in
             (attention.q_proj, attention.k_proj, attention.v_proj)]  # fmt: skip
    queries, keys, values = (each.permute(0, 3, 1, 2, 4).float() for each in split)  # (N, h, R, t, e)
    queries = queries * attention.scale
    scores = queries @ keys.mT + own  # (N, h, R, t, t)
    if before is None:
        seen = scores.softmax(-1) @ values
    else:
        past_keys, past_values, hidden = before
        others = (queries.flatten(2, 3) @ past_keys.mT).unflatten(2, size[1:]) + hidden  # (N, h, R, t, P)
        weights = torch.cat([others, scores], -1).softmax(-1)
        others, scores = weights.split([others.shape[-1], scores.shape[-1]], -1)
        seen = (others.flatten(2, 3) @ past_values).unflatten(2, size[1:]) + scores @ values
    return [attention.out_proj(seen.permute(0, 2, 3, 1, 4).flatten(3)), keys, values]


def _learn(block: _Block, vectors: Tensor) -> None:
    """Have the beginning of a block know its texts. Changes it."""
    import torch

    beginning, vectors = block.beginning, vectors[: len(block.texts)]
    beginning.rows |= {ids: len(beginning.rows) + i for i, ids in enumerate(block.texts)}
    before = [] if beginning.vectors is None else [beginning.vectors]
    beginning.vectors = torch.cat([*before, vectors])


def _shared(beginning: Ids, ids: Ids) -> int:
    """With how many tokens of a beginning a text begins; at least its end is left over."""
    most = min(len(beginning), len(ids) - 1)
    return next((i for i in range(most) if beginning[i] != ids[i]), most)


def _filled(items: Sequence, size: int) -> list:
    """So many items: the last one again and again behind the others."""
    return [*items, *[items[-1]] * (size - len(items))]
