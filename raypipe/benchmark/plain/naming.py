"""Texts for CLIP embeddings as ZeroCap's search is written: one segment at a time, every candidate a text of 77 tokens.

Five times for each token of a text, CLIP reads the texts of the 512 most probable next tokens of each beam, whether it
has read them before or not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from raypipe.segmenters.zero_guidance.captions import ZeroCap


class PlainZeroCap:
    """The search as written, with the options of ours."""

    def __init__(self, search: ZeroCap, clip: Path):
        """Read both networks as transformers has them. clip: the folder of the CLIP that `search` asks."""
        from transformers import CLIPModel, CLIPTokenizer, GPT2LMHeadModel, GPT2Tokenizer

        self.options, self.device, self.encoded = search, search.device, 0
        self.clip = CLIPModel.from_pretrained(clip).eval().requires_grad_(False).to(self.device)
        self.lm = GPT2LMHeadModel.from_pretrained(search.lm).eval().requires_grad_(False).to(self.device)
        self.clip_words, self.words = CLIPTokenizer.from_pretrained(clip), GPT2Tokenizer.from_pretrained(search.lm)

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
