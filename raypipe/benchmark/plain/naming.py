"""Texts for CLIP embeddings as ZeroCap's search is written: one segment at a time, every candidate a text of 77 tokens.

In every step for a token CLIP reads the texts of the 512 most probable ones of each beam, read before or not.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING

import numpy as np

from raypipe.benchmark.figures import Figure
from raypipe.benchmark.turns import compared, ratios, timed
from raypipe.segmenters.zero_guidance import names

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.segmenters.zero_guidance.captions import ZeroCap

SEGMENTS, TOKENS = 2, 3  # texts of so many tokens
WIDTH = 32  # of the networks, which have two layers
START, END = "<|startoftext|>", "<|endoftext|>"


def compare(_subject, _device: str, _images: Sequence[np.ndarray], repeats: int) -> list[Figure]:
    """On the CPU, with random weights, for random embeddings; names by retrieval have no other formulation."""
    from raypipe.features.clip import Clip
    from raypipe.segmenters.zero_guidance.captions import ZeroCap

    rows = np.random.default_rng(0).normal(size=(SEGMENTS, WIDTH)).astype(np.float32)
    seconds, encoded, unlike, nearest = ([], []), ([], []), [], []
    with tempfile.TemporaryDirectory(prefix="raypipe-benchmark-") as folder:
        lm, clip = write_networks(Path(folder))
        network = Clip(clip, method="zero_guidance", device="cpu", vision=False)
        namer, words = names.Namer(network), names.read_vocabulary("default")
        namer(rows)  # with the vocabulary's vectors, which are found once in a run
        for _ in range(repeats):
            search = ZeroCap(lm, network, method="zero_guidance", device="cpu", max_new_tokens=TOKENS)
            plain, texts = PlainZeroCap(search, clip), []
            for arm, times in zip((search, plain.each), seconds, strict=True):
                spent, found = timed(arm, rows)
                times.append(spent / SEGMENTS)
                texts.append(found)
            for counts, arm in zip(encoded, (search, plain), strict=True):
                counts.append(arm.encoded / SEGMENTS)
            unlike.append(float(np.mean([one != other for one, other in zip(*texts, strict=True)])))
            nearest.append(timed(namer, rows)[0] / SEGMENTS)
        asked = sum(map(len, network.tokens([names.TEMPLATE.replace("{}", word) for word in words])))
    case = f", zerocap, {TOKENS} tokens, {SEGMENTS} segments"
    return [
        *compared("naming", seconds, "cpu; 512 candidates a step and beam, 77 tokens each", per="segment", case=case),
        Figure("naming", f"text tokens per segment{case}", "", encoded[0], "what fills up batches included"),
        Figure("naming", f"text tokens per segment, plain{case}", "", encoded[1]),
        Figure("naming", f"times fewer text tokens than plain{case}", "x", ratios(*encoded[::-1])),
        Figure("naming", f"share of segments with texts unlike plain{case}", "", unlike),
        Figure("naming", "time per segment, retrieval", "s", nearest, f"{len(words)} words; no other formulation"),
        Figure("naming", "text tokens per run, retrieval", "", [asked], "of the vocabulary, once; none per segment"),
    ]


def write_networks(folder: Path) -> tuple[Path, Path]:
    """A GPT-2 and a CLIP of random weights with tokenizers of 700 and more tokens: every byte, and pairs of letters."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2LMHeadModel

    letters, pairs = sorted(ByteLevel.alphabet()), [*product(ascii_lowercase, ascii_lowercase[:8])]
    spaced = [("\u0120", each) for each in (*ascii_lowercase, *map("".join, pairs))]  # how GPT-2 writes a space
    ends = [(one, f"{other}</w>") for one, other in pairs]  # how CLIP writes the end of a word
    lm, clip = folder / "lm", folder / "clip"
    words = write_tokenizer(lm, [*letters], [*pairs, *spaced], [END])
    torch.manual_seed(0)
    sizes = {"n_embd": WIDTH, "n_head": 2, "n_layer": 2, "n_positions": 64, "vocab_size": len(words)}
    networks = [GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=words[END], eos_token_id=words[END]))]
    words = write_tokenizer(clip, [*letters, *(f"{letter}</w>" for letter in letters)], [*pairs, *ends], [START, END])
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 2 * WIDTH}
    marks = {"vocab_size": len(words), "bos_token_id": words[START], "eos_token_id": words[END]}
    networks.append(CLIPModel(CLIPConfig(text_config=sizes | marks, vision_config=sizes, projection_dim=WIDTH)))
    for network, where in zip(networks, (lm, clip), strict=True):
        for parameter in network.parameters():  # transformers' own start is so small that all tokens are alike
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter, gain=1.5)
        network.save_pretrained(where)
    return lm, clip


def write_tokenizer(
    folder: Path, letters: Sequence[str], merges: Sequence[tuple[str, str]], special: Sequence[str]
) -> dict[str, int]:
    """The files of a byte-level tokenizer as GPT-2 and CLIP have it. Returns its vocabulary."""
    words = {word: i for i, word in enumerate([*letters, *map("".join, merges), *special])}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    settings = {"bos_token": special[0], "eos_token": special[-1], "unk_token": special[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return words


class PlainZeroCap:
    """The search as written, with the options of ours."""

    def __init__(self, search: ZeroCap, clip: Path):
        """Read both networks as transformers has them. clip: the folder of the CLIP that `search` asks."""
        from transformers import CLIPModel, CLIPTokenizer, GPT2LMHeadModel, GPT2Tokenizer

        self.options, self.device, self.encoded = search, search.device, 0
        self.clip = CLIPModel.from_pretrained(clip).eval().requires_grad_(False).to(self.device)
        self.lm = GPT2LMHeadModel.from_pretrained(search.lm).eval().requires_grad_(False).to(self.device)
        self.clip_words, self.words = CLIPTokenizer.from_pretrained(clip), GPT2Tokenizer.from_pretrained(search.lm)

    def each(self, embeddings) -> list[list[str]]:
        """The texts of each segment, one after the other."""
        return [self(row) for row in embeddings]

    def __call__(self, embedding) -> list[str]:
        """The texts of one segment, best first. embedding: float (D,)."""
        import torch

        options, end = self.options, self.words.encode(".")[0]
        unit = torch.as_tensor(embedding, dtype=torch.float32, device=self.device)
        unit = unit / unit.norm()
        begin = [self.words.bos_token_id, *self.words.encode(options.prompt)]
        beams = [([], 0.0, False)]  # tokens, sum of log-probabilities, whether it has ended
        for i in range(options.max_new_tokens):
            growing = [each for each in beams if not each[2]]
            if not growing:
                break
            log_p = self.next_of(unit, torch.tensor([begin + tokens for tokens, *_ in growing], device=self.device), i)
            candidates = [each for each in beams if each[2]]
            for (tokens, score, _), row in zip(growing, log_p, strict=True):
                values, following = row.topk(options.beam_size)
                for value, token in zip(values.tolist(), following.tolist(), strict=True):
                    candidates.append(([*tokens, token], score + value, token == end))
            beams = sorted(candidates, key=lambda each: -each[1] / len(each[0]))[: options.beam_size]
        return [self.words.decode(tokens, clean_up_tokenization_spaces=False) for tokens, *_ in beams]

    def next_of(self, unit: Tensor, context: Tensor, i: int) -> Tensor:
        """Log-probabilities of the next token of each beam: float32 (b, V). context: int64 (b, T)."""
        import torch

        options, end = self.options, self.words.encode(".")[0]
        with torch.no_grad():
            before = self.lm(context).logits[:, -1].softmax(-1)
            past = self.lm(context[:, :-1], use_cache=True)[1]
        past = [(layer.keys, layer.values) for layer in past.layers]
        offsets = [[torch.zeros_like(each) for each in layer] for layer in past]
        for _ in range(options.steps):
            offsets = [[each.detach().requires_grad_() for each in layer] for layer in offsets]
            p = self.logits(context, past, offsets).softmax(-1)
            loss = options.clip_scale * self.clip_loss(unit, context, p)
            loss = loss + options.ce_scale * (p * (p.log() - before.log())).sum()
            loss.backward()
            with torch.no_grad():
                for layer in offsets:
                    for each in layer:
                        norm = each.grad.norm(dim=(2, 3)).norm(dim=1)[:, None, None, None]
                        each -= options.step_size * each.grad / (norm + 1e-15) ** options.grad_norm_factor
        with torch.no_grad():
            z = self.logits(context, past, offsets)
            for token, factor in [(end, options.end_factor if i else 1 / options.start_factor)] + [
                (int(token), 1 / options.forbidden_factor) for token in options.is_forbidden.nonzero()
            ]:
                z[:, token] = torch.where(z[:, token] > 0, z[:, token] * factor, z[:, token] / factor)
            fused = z.log_softmax(-1) * options.fusion + before.log() * (1 - options.fusion)
            return fused.log_softmax(-1)

    def logits(self, context: Tensor, past: list, offsets: list) -> Tensor:
        """What follows the last token, with keys and values moved."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for i, (kept, moved) in enumerate(zip(past, offsets, strict=True)):
            cache.update(kept[0] + moved[0], kept[1] + moved[1], i)
        return self.lm(context[:, -1:], cache).logits[:, -1]

    def clip_loss(self, unit: Tensor, context: Tensor, p: Tensor) -> Tensor:
        """The distance of the most probable tokens from what CLIP makes of their texts, summed over beams."""
        import torch

        loss = 0.0
        for row, tokens in zip(p, context, strict=True):
            top = row.topk(min(self.options.top_k_texts, len(row))).indices
            before = self.words.decode(tokens[1:].tolist(), clean_up_tokenization_spaces=False)
            texts = [before + self.words.decode([token], clean_up_tokenization_spaces=False) for token in top.tolist()]
            with torch.no_grad():
                wanted = (self.vectors(texts) @ unit / self.options.clip_temperature).softmax(-1)
            loss = loss - (wanted * row[top].log()).sum()
        return loss

    def vectors(self, texts: list[str]) -> Tensor:
        """CLIP's embeddings of texts, filled up to all that it reads: float32 (n, D) of length 1."""
        import torch

        given = self.clip_words(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        ids = given["input_ids"].to(self.device)
        self.encoded += ids.numel()
        states = self.clip.text_model(ids, attention_mask=given["attention_mask"].to(self.device)).last_hidden_state
        ends = (ids == self.clip_words.eos_token_id).int().argmax(-1)
        found = self.clip.text_projection(states[torch.arange(len(ids), device=self.device), ends])
        return found / found.norm(dim=-1, keepdim=True)
