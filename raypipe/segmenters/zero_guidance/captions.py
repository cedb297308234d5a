"""Short texts for CLIP embeddings: ZeroCap's search with GPT-2 (Tewel et al., CVPR 2022).

Token by token, the keys and values that GPT-2 keeps of the text so far are moved until its most probable next tokens
are those whose texts CLIP finds near the embedding. All weights are frozen and nothing is random.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypipe import networks
from raypipe.lookup import one_line

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.features.clip import Clip

TINY = 1e-15  # added to the norm of a gradient (ZeroCap's code)
# Beams that GPT-2 reads at once, filled up to so many: 4 GB with GPT-2 medium. On the CPU those of a segment: it gains
# little from more, and so nothing depends on what is beside them.
ROWS = {"cuda": 128}
COUNTS = ("beam_size", "max_new_tokens", "steps", "top_k_texts")
ABOVE_ZERO = ("clip_temperature", "end_factor", "start_factor", "forbidden_factor")
FROM_ZERO = ("clip_scale", "ce_scale", "step_size", "grad_norm_factor", "fusion")


@dataclass
class ZeroCap:
    """The search, loaded when it is made. Defaults are those of zero-guidance segmentation (supplement, code)."""

    lm: Path  # a folder of `networks.locate` with a GPT-2 and its tokenizer
    clip: Clip  # read with its texts
    _: KW_ONLY
    method: str  # whose errors these are
    device: str
    dtype: str = "auto"  # of CLIP's text network, see `networks.autocast`; GPT-2 and similarities are float32
    prompt: str = "Image of a"
    beam_size: int = 5
    max_new_tokens: int = 15
    steps: int = 5  # of gradient descent, for each token
    clip_temperature: float = 0.01
    clip_scale: float = 1.0
    ce_scale: float = 0.2
    step_size: float = 0.3
    grad_norm_factor: float = 0.9
    fusion: float = 0.99  # of the moved distribution with GPT-2's own
    top_k_texts: int = 512  # tokens whose texts CLIP is asked in a step
    end_factor: float = 1.1  # for the full stop (ZeroCap by itself has 1.01)
    start_factor: float = 1.6  # against it as the first token
    forbidden_factor: float = 20.0
    forbidden: str | Sequence[int] = "default"  # tokens that are made improbable, or the rule of `forbidden_tokens`

    def __post_init__(self):
        """Read GPT-2. Raises ValueError for options out of range and for a folder without a whole one."""
        import torch

        from raypipe.features.clip_prefix import Continuations

        check_options(self, method=self.method)
        self.network, self._words = _read(self.lm, method=self.method, device=self.device)
        self.begin, (self.end,) = [self._words.bos_token_id, *self._words.encode(self.prompt)], self._words.encode(".")
        reads, words = self.network.config.n_positions, self.network.config.vocab_size
        if len(self.begin) + self.max_new_tokens > reads:
            text = f"with max_new_tokens {self.max_new_tokens} a text has more than the {reads} tokens of {self.lm}"
            raise ValueError(f"{self.method}: {text}; choose fewer")
        self.texts = [self.decode([token]) for token in range(words)]
        forbidden = self.forbidden
        tokens = forbidden_tokens(self.texts, forbidden) if isinstance(forbidden, str) else [*forbidden]
        self.is_forbidden = torch.zeros(words, dtype=bool, device=self.device)
        self.is_forbidden[tokens] = True
        if self.is_forbidden.all():
            raise ValueError(f"{self.method}: forbidden {forbidden!r} leaves no token of {self.lm}; forbid fewer")
        options = {"method": self.method, "device": self.device, "dtype": self.dtype}
        self.clip_texts = Continuations(self.clip, **options, pinned=self.decode(self.begin[1:]))

    @property
    def encoded(self) -> int:
        """Tokens that went through CLIP's text network so far, those that fill up its batches included."""
        return self.clip_texts.encoded

    def __call__(self, embeddings: np.ndarray) -> list[list[str]]:
        """The texts found for each segment, best first, as GPT-2 writes them: a space before, often a stop behind.

        embeddings: float (S, D), finite, of any length. Returns beam_size texts of each; what is half a character is
        U+FFFD. On the CPU a segment's texts never depend on the others.
        """
        import torch

        rows = torch.from_numpy(np.array(embeddings, np.float32)).to(self.device)
        units = torch.nn.functional.normalize(rows, dim=-1)
        beams = [_Beams.empty() for _ in units]
        for _ in range(self.max_new_tokens):
            growing = [i for i, each in enumerate(beams) if not each.is_ended.all()]
            rows = [[(units[i], tokens) for tokens in beams[i].tokens[~beams[i].is_ended]] for i in growing]
            for i, found in zip(growing, self._continued(rows), strict=True):
                beams[i] = beams[i].grown(*found, self.end)
        return [[self.decode(tokens) for tokens in each.best_first()] for each in beams]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some of GPT-2's tokens, as it is."""
        return self._words.decode(tokens, clean_up_tokenization_spaces=False)

    def _continued(self, rows: Sequence[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
        """The best next tokens of each segment's rows: log-probabilities and tokens, (rows, beam_size) on the CPU."""
        import torch

        if not rows:
            return []
        batches, size, sizes = rows, ROWS.get(self.device), [len(each) for each in rows]
        if size:
            flat = [row for each in rows for row in each]
            batches = [flat[start : start + size] for start in range(0, len(flat), size)]
        found = zip(*(self._best(batch, size or len(batch)) for batch in batches), strict=True)
        return [*zip(*(torch.cat(each).split(sizes) for each in found), strict=True)]

    def _best(self, rows: list[tuple[Tensor, Tensor]], size: int) -> tuple[Tensor, Tensor]:
        """The same of rows, an embedding of length 1 and the tokens so far in each, filled up to a size.

        Where memory lacks, of half as many at a time.
        """
        import torch

        try:
            return self._at_once(rows, size)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        middle = len(rows) // 2  # out of `except`, which holds on to all that was computed
        halves = [self._best(half, len(half)) for half in (rows[:middle], rows[middle:])]
        return tuple(torch.cat(each) for each in zip(*halves, strict=True))

    def _at_once(self, rows: list[tuple[Tensor, Tensor]], size: int) -> tuple[Tensor, Tensor]:
        import torch

        units, texts = (torch.stack(each) for each in zip(*rows, strict=True))
        step = Step(self, units, texts.to(self.device), size=size)
        for _ in range(self.steps):
            step.descend()
        best = step.log_p().topk(min(self.beam_size, len(self.texts)))
        return best.values.cpu(), best.indices.cpu()


class Step:
    """The search for the next token of n texts, each for its own embedding."""

    def __init__(self, search: ZeroCap, units: Tensor, texts: Tensor, *, size: int = 0):
        """Before any gradient step.

        units: float32 (n, D) of length 1. texts: int64 (n, i), without the prompt. size: to how many the last one is
        repeated.
        """
        import torch

        self._search, self._units, self._is_first = search, units, texts.shape[1] == 0
        begin = torch.tensor([search.begin], device=texts.device).expand(len(texts), -1)
        tokens = torch.cat([begin, texts], 1)
        self._texts = [search.decode(each) for each in tokens[:, 1:].tolist()]
        tokens = torch.cat([tokens, tokens[-1:].expand(max(0, size - len(texts)), -1)])
        self._last = tokens[:, -1:]
        cache = _cache()
        with torch.no_grad(), networks.autocast(search.device, "float32"):
            search.network.transformer(tokens[:, :-1], cache)
        kept = [each for layer in cache.layers for each in (layer.keys, layer.values)]
        self._past = torch.stack(kept)  # (2 L, n, heads, T - 1, head_dim)
        self.shift = torch.zeros_like(self._past)  # what is added to it
        self._cosines = torch.full((len(tokens), len(search.texts)), torch.nan, device=texts.device)  # as far as asked
        self.start: Tensor | None = None  # log-probabilities of the unmoved network, (n, V)

    def descend(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Move keys and values once against the gradient.

        Returns what was before: log-probabilities (n, V), CLIP's loss and the distance from the unmoved network (n,),
        and the gradient, as `shift`.
        """
        import torch

        search = self._search
        shift = self.shift.requires_grad_()
        with networks.autocast(search.device, "float32"):
            log_p = self._logits(shift).log_softmax(-1)
            self.start = log_p.detach() if self.start is None else self.start
            clip_loss = self._clip_loss(log_p)
            distance = (log_p.exp() * (log_p - self.start)).sum(-1)
            loss = search.clip_scale * clip_loss + search.ce_scale * distance
            (gradient,) = torch.autograd.grad(loss.sum(), shift)
        norm = gradient.flatten(2).norm(dim=-1)[..., None, None, None] + TINY  # of each layer, K or V, and text
        self.shift = shift.detach() - search.step_size * gradient / norm**search.grad_norm_factor
        return log_p.detach(), clip_loss.detach(), distance.detach(), gradient

    def log_p(self) -> Tensor:
        """Log-probabilities of the next token after the steps: float32 (n, V)."""
        import torch

        search = self._search
        with torch.no_grad(), networks.autocast(search.device, "float32"):
            logits = self._logits(self.shift)
            factors = torch.ones_like(logits[0])
            factors[search.end] = 1 / search.start_factor if self._is_first else search.end_factor
            factors[search.is_forbidden] /= search.forbidden_factor
            moved = torch.where(logits > 0, logits * factors, logits / factors).log_softmax(-1)
            log_p = (search.fusion * moved + (1 - search.fusion) * self.start).log_softmax(-1)
        log_p = log_p[: len(self._texts)]
        if not log_p.isfinite().all():
            raise ValueError(f"{search.method}: {search.lm} gives no finite numbers; use other weights")
        return log_p

    def _logits(self, shift: Tensor) -> Tensor:
        cache, moved = _cache(), (self._past + shift).unbind()
        for i in range(0, len(moved), 2):
            cache.update(moved[i], moved[i + 1], i // 2)
        return self._search.network(self._last, cache).logits[:, -1]

    def _clip_loss(self, log_p: Tensor) -> Tensor:
        """How far the most probable tokens are from what CLIP makes of their texts: float32 (n,)."""
        top = log_p.detach().topk(min(self._search.top_k_texts, log_p.shape[1])).indices  # (n, k)
        self._ask(top)
        wanted = (self._cosines.gather(1, top) / self._search.clip_temperature).softmax(-1)
        return -(wanted * log_p.gather(1, top)).sum(-1)

    def _ask(self, tokens: Tensor) -> None:
        """Have the cosines of the embeddings with the texts that end with these tokens, (n, k)."""
        search, count = self._search, len(self._texts)
        is_new = self._cosines.gather(1, tokens).isnan()[:count].cpu()
        new = [each[chosen] for each, chosen in zip(tokens[:count].cpu(), is_new, strict=True)]
        behind = [[search.texts[token] for token in each.tolist()] for each in new]
        found = search.clip_texts.embed([*zip(self._texts, behind, strict=True)])
        for i, (each, vectors) in enumerate(zip(new, found, strict=True)):
            # in double precision, so that they are rounded alike however many they are
            self._cosines[i, each] = (vectors.double() @ self._units[i].double()).float()
        self._cosines[count:] = self._cosines[count - 1]


@dataclass
class _Beams:
    """The texts of one segment that are still in the race."""

    tokens: Tensor  # int64 (b, i), of ended ones filled with 0
    scores: Tensor  # float32 (b,), sums of log-probabilities
    lengths: Tensor  # int64 (b,)
    is_ended: Tensor  # bool (b,)

    @classmethod
    def empty(cls) -> _Beams:
        """One text without a token."""
        import torch

        return cls(torch.empty(1, 0, dtype=int), torch.zeros(1), torch.zeros(1, dtype=int), torch.zeros(1, dtype=bool))

    def grown(self, log_p: Tensor, tokens: Tensor, end: int) -> _Beams:
        """The best by average log-probability of all texts with one of their best next tokens, and of the ended ones.

        log_p, tokens: (n, b) of the n texts that have not ended.
        """
        import torch

        size = log_p.shape[1]
        totals = torch.full((len(self.tokens), size), -torch.inf)
        totals[self.is_ended, 0] = self.scores[self.is_ended]
        totals[~self.is_ended] = self.scores[~self.is_ended, None] + log_p
        following = torch.zeros(totals.shape, dtype=int)
        following[~self.is_ended] = tokens
        lengths = self.lengths + ~self.is_ended
        averages, best = (totals / lengths[:, None]).flatten().topk(size)
        source, following, lengths = best // size, following.flatten()[best], lengths[best // size]
        is_ended = self.is_ended[source] | (following == end)
        return _Beams(torch.cat([self.tokens[source], following[:, None]], 1), averages * lengths, lengths, is_ended)

    def best_first(self) -> list[list[int]]:
        """The tokens of each text up to its end."""
        order = (self.scores / self.lengths).argsort(descending=True, stable=True)
        return [self.tokens[i, : self.lengths[i]].tolist() for i in order]


def check_options(options, *, method: str) -> None:
    """Raise ValueError where options that are named as `ZeroCap`'s, some or all, are no such ones."""
    for names, is_right, expected in (
        (COUNTS, lambda value: value >= 1, "at least 1"),
        (ABOVE_ZERO, lambda value: 0 < value < float("inf"), "above 0"),
        (FROM_ZERO, lambda value: 0 <= value < float("inf"), "0 or more"),
        (("fusion",), lambda value: value <= 1, "at most 1"),
    ):
        for name in names:
            if hasattr(options, name) and not is_right(value := getattr(options, name)):
                raise ValueError(f"{method}: {name} must be {expected}, got {value!r}")
    if isinstance(options.forbidden, str):
        try:
            re.compile(options.forbidden)
        except re.error as error:
            text = f"forbidden must be default, none or a regular expression, got {options.forbidden!r}: {error}"
            raise ValueError(f"{method}: {text}") from error


def forbidden_tokens(texts: Sequence[str], rule: str = "default") -> list[int]:
    """The tokens that the search shall not take.

    rule: `default`, those that no short name has: blank ones, digits, signs but `.` and `'`, and capitals behind a
    space; `none`; or a regular expression that is looked for in the text of each, a blank before a word included.
    """
    if rule != "default":
        return [i for i, text in enumerate(texts) if rule != "none" and re.search(rule, text)]
    return [
        i
        for i, text in enumerate(texts)
        if not all(letter.isalpha() or letter in ".'" for letter in text.strip())
        or (text[:1].isspace() and text.strip()[:1].isupper())
        or not text.strip()
    ]


def _cache():
    from transformers import DynamicCache

    return DynamicCache()


def _read(path: Path, *, method: str, device: str):
    """A GPT-2 and its tokenizer. Raises ValueError where one lacks or they do not belong together."""
    from transformers import GPT2LMHeadModel, GPT2Tokenizer

    network = networks.pretrained(GPT2LMHeadModel, path, method=method, device=device, attn_implementation="eager")
    try:
        words = GPT2Tokenizer.from_pretrained(path, local_files_only=True)
        if len(words) != network.config.vocab_size:
            raise ValueError(f"it has {len(words)} tokens, the network {network.config.vocab_size}")
        if words.bos_token_id is None or len(words.encode(".")) != 1:
            raise ValueError("it has no start or no full stop")
    except Exception as error:  # many kinds: one file of two, torn files, another tokenizer
        text = f"{path} holds no tokenizer of its GPT-2 ({one_line(error)})"
        raise ValueError(f"{method}: {text}; expected its vocab.json and merges.txt, or tokenizer.json") from error
    return network, words
