"""Many texts that begin alike, through CLIP's text network: what the beginning says is computed once for all of them.

The network is causal, no token sees those behind it. So the keys and values of a beginning's tokens are those of every
text whose first tokens are the same, and of each text only the tokens behind these are asked, and its end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raypipe import networks
from raypipe.features.clip import Clip
from raypipe.features.clip_vit import Vit

if TYPE_CHECKING:
    from torch import Tensor

# Texts are asked in blocks with one beginning, of so many texts, so many blocks at once, both filled up: the same
# products of matrices whatever is asked, so that no text's numbers depend on those beside it.
BLOCKS = {"cpu": (1, 64), "cuda": (16, 64)}
ROOMS = (2, 4, 8, 16, 32, 64)  # tokens behind the beginning that a block has room for
KEPT = 160  # beginnings that are remembered, with the texts asked behind them: of ViT-L/14 about 3 MB each

Ids = tuple[int, ...]  # all tokens of a text, start and end included
Block = tuple["_Beginning", list[tuple[Ids, int]]]  # texts, with how many of the beginning's tokens they begin


@dataclass(eq=False)
class _Beginning:
    text: str
    ids: Ids  # without the end
    is_whole: bool  # whether they are all of the text's
    rows: dict[str, int] = field(default_factory=dict)  # where in `vectors` what follows the text is
    rows_of_ids: dict[Ids, int] = field(default_factory=dict)  # several texts may have the same tokens
    past: Tensor | None = None  # keys and values of each layer in turns: (2 L, heads, P, head_dim)
    vectors: Tensor | None = None  # float32 (n, D), of length 1


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
        self._words, self._end, self._most = vit.tokenizer.backend_tokenizer, vit.tokenizer.eos_token_id, vit.context
        self._text, self._projection = vit._network.text_model, vit._network.text_projection
        self._method, self._device, self._dtype, self._pinned = method, device, dtype, pinned
        self._begun: dict[str, _Beginning] = {}  # the last one used is the last
        self._ids_behind: dict[str, Ids] = {}  # of texts with a space before them, start and end left out
        self.encoded = 0  # tokens that went through the network so far, those that fill up included

    def embed(self, asked: Sequence[tuple[str, Sequence[str]]]) -> list[Tensor]:
        """What CLIP makes of texts: for each beginning float32 (n, D), rows of length 1.

        asked: beginnings, each with what follows it in n texts. A text is asked once while its beginning is remembered,
        all at once on a GPU. Longer ones than the network reads lose their ends. Raises ValueError for weights that
        give no finite numbers.
        """
        import torch

        begun = self._remembered([text for text, _ in asked])
        wanted = [(one, text) for one, (_, texts) in zip(begun, asked, strict=True) for text in texts]
        new = {(one.text, text): (one, text) for one, text in wanted if text not in one.rows}
        ids = self._tokens([*new.values()])
        with torch.no_grad(), networks.autocast(self._device, self._dtype):
            self._learn([(one, each) for (one, _), each in zip(new.values(), ids, strict=True)])
        for (one, text), each in zip(new.values(), ids, strict=True):
            one.rows[text] = one.rows_of_ids[each]
        none = torch.empty(0, self._projection.out_features, device=self._device)
        pairs = zip(begun, asked, strict=True)
        return [one.vectors[[one.rows[text] for text in texts]] if texts else none for one, (_, texts) in pairs]

    def _remembered(self, texts: Sequence[str]) -> list[_Beginning]:
        for text in dict.fromkeys(texts):
            found = self._begun.pop(text, None)
            self._begun[text] = found or self._new(text)
        found = [self._begun[text] for text in texts]
        for text in [text for text in self._begun if text != self._pinned][: max(0, len(self._begun) - KEPT)]:
            del self._begun[text]
        return found

    def _new(self, text: str) -> _Beginning:
        found = self._words.encode(text).ids
        ids = self._cut(found)[:-1]
        return _Beginning(text, ids, len(ids) == len(found) - 1)

    def _tokens(self, pairs: Sequence[tuple[_Beginning, str]]) -> list[Ids]:
        """All tokens of beginnings with what follows.

        A space parts words, whose tokens are then always the same. What follows without one may change the tokens of
        the word before it: that is read with its beginning, each by itself.
        """
        is_apart = [one.is_whole and text.startswith(" ") for one, text in pairs]
        each = [*zip(pairs, is_apart, strict=True)]
        alone = [*{text for (_, text), apart in each if apart and text not in self._ids_behind}]
        whole = [one.text + text for (one, text), apart in each if not apart]
        found = [each.ids for each in self._words.encode_batch([*alone, *whole])]
        self._ids_behind |= {text: tuple(ids[1:-1]) for text, ids in zip(alone, found, strict=False)}
        rest = iter(found[len(alone) :])
        joined = ((*one.ids, *self._ids_behind.get(text, ()), self._end) for one, text in pairs)
        return [self._cut(ids if apart else next(rest)) for ids, apart in zip(joined, is_apart, strict=True)]

    def _cut(self, ids: Sequence[int]) -> Ids:
        """Tokens up to the first end, which is where CLIP reads a text."""
        return (*ids[: min(ids.index(self._end), self._most - 1)], self._end)

    def _learn(self, pairs: Sequence[tuple[_Beginning, Ids]]) -> None:
        """Have each beginning know these texts."""
        groups = defaultdict(dict)  # of what a block may hold together; each text once
        for beginning, ids in pairs:
            if ids not in beginning.rows_of_ids:
                shared = _shared(beginning.ids, ids)
                room = next((room for room in ROOMS if room >= len(ids) - shared), self._most)
                groups[room, beginning][ids] = shared
        at_once, size = BLOCKS[self._device]
        blocks = defaultdict(list)  # by room
        for (room, beginning), texts in groups.items():
            texts = [*texts.items()]
            blocks[room] += [(beginning, texts[start : start + size]) for start in range(0, len(texts), size)]
        self._begin([*{beginning: None for _, beginning in groups if beginning.past is None}])
        for room, each in blocks.items():
            for start in range(0, len(each), at_once):
                batch = each[start : start + at_once]
                for (beginning, texts), vectors in zip(batch, self._through(batch, room), strict=False):
                    _keep(beginning, [ids for ids, _ in texts], vectors[: len(texts)])

    def _begin(self, beginnings: Sequence[_Beginning]) -> None:
        """Find the keys and values of beginnings."""
        import torch

        step = BLOCKS[self._device][0]
        for start in range(0, len(beginnings), step):
            batch = beginnings[start : start + step]
            room = len(batch[0].ids) if step == 1 else self._most
            ids = torch.tensor([_filled([_filled(each.ids, room) for each in batch], step)], device=self._device)
            _, past = self._layers(ids, torch.zeros(1, step, dtype=int, device=self._device))
            for i, each in enumerate(batch):
                each.past = past[:, 0, :, i, : len(each.ids)].clone()

    def _through(self, blocks: Sequence[Block], room: int) -> Tensor:
        """The vectors of blocks of texts, and of what fills them up: float32 (blocks, texts, D)."""
        import torch
        from torch.nn.functional import pad

        at_once, size = BLOCKS[self._device]
        begun, texts = zip(*((one, _filled(each, size)) for one, each in _filled(blocks, at_once)), strict=True)
        longest = len(begun[0].ids) if at_once == 1 else self._most
        past = torch.stack([pad(each.past, (0, 0, 0, longest - len(each.ids))) for each in begun], 1)
        behind = [[_filled(ids[shared:], room) for ids, shared in each] for each in texts]
        shared = torch.tensor([[shared for _, shared in each] for each in texts], device=self._device)
        ends = torch.tensor([[len(ids) - 1 for ids, _ in each] for each in texts], device=self._device) - shared
        states, _ = self._layers(torch.tensor(behind, device=self._device), shared, past)
        last = states.gather(2, ends[..., None, None].expand(-1, -1, 1, states.shape[-1]))[:, :, 0].float()
        with torch.autocast(self._device, enabled=False):
            vectors = self._projection(self._text.final_layer_norm(last))
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        if not vectors.isfinite().all():
            raise ValueError(f"{self._method}: CLIP makes no finite numbers of a text; use other weights")
        return vectors

    def _layers(self, ids: Tensor, shared: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens of blocks of texts behind all layers: (N, R, t, d), and their keys and values (2 L, N, h, R, t, e).

        ids: int64 (N, R, t). shared: int64 (N, R), how many are before them. past: keys and values of those, of which
        there may be more, (2 L, N, h, P, e).
        """
        import torch

        room, found, embeddings = ids.shape[2], [], self._text.embeddings
        self.encoded += ids.numel()
        positions = (shared[..., None] + torch.arange(room, device=ids.device)).clamp_max(self._most - 1)
        own = torch.full((room, room), -torch.inf, device=ids.device).triu(1)
        hidden = None
        if past is not None:
            columns = torch.arange(past.shape[3], device=ids.device)
            hidden = torch.where(columns < shared[..., None], 0.0, -torch.inf)[:, None, :, None]  # (N, 1, R, 1, P)
        states = embeddings.token_embedding(ids) + embeddings.position_embedding(positions)
        for i, layer in enumerate(self._text.encoder.layers):
            before = None if past is None else (*past[2 * i : 2 * i + 2], hidden)
            seen, *kept = _attend(layer.self_attn, layer.layer_norm1(states), own, before)
            states = states + seen
            states = states + layer.mlp(layer.layer_norm2(states))
            found += kept
        return states, torch.stack(found)


def _attend(attention, given: Tensor, own: Tensor, before: tuple[Tensor, Tensor, Tensor] | None) -> list[Tensor]:
    """What tokens (N, R, t, d) see of themselves and of those before; with their keys and values, (N, h, R, t, e).

    own: (t, t), added. before: keys and values (N, h, P, e), and what is added to their part, (N, 1, R, 1, P).
    """
    import torch

    size = given.shape[1:3]
    split = [project(given).unflatten(-1, (attention.num_heads, -1)).permute(0, 3, 1, 2, 4)
             for project in (attention.q_proj, attention.k_proj, attention.v_proj)]  # fmt: skip
    queries, keys, values = split  # (N, h, R, t, e)
    queries = queries * attention.scale
    scores = queries @ keys.mT + own  # (N, h, R, t, t)
    if before is None:
        seen = scores.softmax(-1).to(values.dtype) @ values
    else:
        past_keys, past_values, hidden = before
        others = (queries.flatten(2, 3) @ past_keys.mT).unflatten(2, size) + hidden  # (N, h, R, t, P)
        weights = torch.cat([others, scores], -1).softmax(-1).to(values.dtype)
        others, weights = weights.split([others.shape[-1], scores.shape[-1]], -1)
        seen = (others.flatten(2, 3) @ past_values).unflatten(2, size) + weights @ values
    return [attention.out_proj(seen.permute(0, 2, 3, 1, 4).flatten(3)), keys, values]


def _keep(beginning: _Beginning, texts: Sequence[Ids], vectors: Tensor) -> None:
    """Have a beginning know the vectors of texts, (n, D). Changes it."""
    import torch

    before = [] if beginning.vectors is None else [beginning.vectors]
    beginning.vectors = torch.cat([*before, vectors])  # first: memory may lack
    beginning.rows_of_ids |= {ids: len(beginning.rows_of_ids) + i for i, ids in enumerate(texts)}


def _shared(beginning: Ids, ids: Ids) -> int:
    """With how many tokens of a beginning a text begins; at least its end is left over."""
    most = min(len(beginning), len(ids) - 1)
    if beginning[:most] == ids[:most]:
        return most
    return next(i for i in range(most) if beginning[i] != ids[i])


def _filled(items: Sequence, size: int) -> list:
    """So many items: the last one again and again behind the others."""
    return [*items, *[items[-1]] * (size - len(items))]
