"""Texts that begin alike: what CLIP makes of them does not depend on what is kept, shared or asked beside them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny._clip import write_model

from raypipe.features import clip_prefix
from raypipe.features.clip import Clip
from raypipe.features.clip_prefix import Continuations

pytestmark = pytest.mark.usefixtures("one_thread")
BEGINNINGS = ["Image of a", "Image of a bat", "image of a b", "Image of a half \ufffd", "", "Image<|endoftext|> of"]
# the tokenizer knows `att` and `at`: what follows `at` or `a` may change the tokens before
BEHIND = [" cat", "t", "tt", "s", " a  t", ".", " ", "\n", "\ufffd", "\u0308", "<|endoftext|>", " 2019", "Ĳ", " Σ", ""]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(weights) -> Clip:
    return Clip(weights, method="test", device="cpu", vision=False)


def made(clip: Clip, **options) -> Continuations:
    return Continuations(clip, method="test", device="cpu", **options)


@pytest.mark.parametrize("blocks", [(1, 32), (3, 4)], ids=["as on the CPU", "as on a GPU"])
def test_texts_are_embedded_as_by_the_whole_network(blocks, clip, monkeypatch):
    monkeypatch.setitem(clip_prefix.BLOCKS, "cpu", blocks)
    found = made(clip).embed([(beginning, BEHIND) for beginning in BEGINNINGS])
    for beginning, rows in zip(BEGINNINGS, found, strict=True):
        for behind, row in zip(BEHIND, rows, strict=True):
            expected = clip.text_features([beginning + behind], "all")[0]
            np.testing.assert_allclose(row, expected / expected.norm(), atol=2e-6, err_msg=repr(beginning + behind))


def test_bfloat16_stays_near_float32_and_what_comes_out_is_float32(clip):
    asked = [(beginning, BEHIND) for beginning in BEGINNINGS]
    for exact, found in zip(*(made(clip, dtype=dtype).embed(asked) for dtype in ("float32", "bfloat16")), strict=True):
        assert found.dtype == torch.float32 and 0 < (exact - found).abs().max() < 0.02
        assert (found.norm(dim=1) - 1).abs().max() < 1e-6


def test_texts_longer_than_the_network_reads_lose_their_ends(tmp_path):
    short = Clip(write_model(tmp_path, context=12), method="test", device="cpu", vision=False)
    asked = [("a dog", [" runs over the hill"]), ("an even longer beginning", ["s", " of it"])]
    for (beginning, behind), rows in zip(asked, made(short).embed(asked), strict=True):
        for text, row in zip(behind, rows, strict=True):
            expected = short.text_features([beginning + text])[0]
            np.testing.assert_allclose(row, expected / expected.norm(), atol=2e-6)


@pytest.mark.parametrize(("dtype", "blocks"), [("float32", (1, 32)), ("bfloat16", (3, 4))])
def test_no_bit_depends_on_what_is_asked_beside_before_or_again(dtype, blocks, clip, monkeypatch):
    monkeypatch.setitem(clip_prefix.BLOCKS, "cpu", blocks)
    rng, behind = (
        np.random.default_rng(0),
        [*BEHIND, *(f" {chr(97 + i)}{chr(97 + j)}" for i in range(9) for j in range(9))],
    )
    whole = dict(zip(BEGINNINGS, made(clip, dtype=dtype).embed([(one, behind) for one in BEGINNINGS]), strict=True))
    monkeypatch.setattr(clip_prefix, "KEPT", 2)  # of six: most are forgotten
    asked = made(clip, dtype=dtype, pinned=BEGINNINGS[0])
    for _ in range(12):
        texts = [
            (BEGINNINGS[i], rng.permutation(len(behind))[: rng.integers(0, 40)].tolist())
            for i in rng.permutation(len(BEGINNINGS))[: rng.integers(1, 5)]
        ]
        found = asked.embed([(beginning, [behind[i] for i in numbers]) for beginning, numbers in texts])
        for (beginning, numbers), rows in zip(texts, found, strict=True):
            assert rows.dtype == torch.float32 and torch.equal(rows, whole[beginning][numbers])


def test_a_text_is_asked_once_while_its_beginning_is_remembered(clip, monkeypatch):
    monkeypatch.setattr(clip_prefix, "KEPT", 2)
    asked = made(clip, pinned="Image of a")
    counts = []
    for beginning, texts in [
        ("Image of a", [" cat"] * 3),
        ("Image of a", [" CAT", "  cat"]),  # the same tokens
        ("Image of a dog", [" at"]),
        ("Image of a cow", [" at"]),  # forgets the dog, for what is pinned stays
        ("Image of a", [" cat", " cow"]),
        ("Image of a dog", [" at"]),
    ]:
        before = asked.encoded
        asked.embed([(beginning, texts)])
        counts.append(asked.encoded - before)
    assert counts[1] == 0 and 0 not in (counts[0], *counts[2:])
    beginning = len(clip.tokens(["Image of a"])[0]) - 1
    assert counts[0] == beginning + counts[4]  # one block of the same size; keys and values of the beginning stay
    assert counts[5] == counts[2]


def test_damaged_weights_are_refused(weights):
    damaged = Clip(weights, method="test", device="cpu", vision=False)
    torch.nn.init.constant_(damaged._network._network.text_projection.weight, float("nan"))
    with pytest.raises(ValueError, match="test: CLIP makes no finite numbers of a text; use other weights"):
        made(damaged).embed([("Image of a", [" cat"])])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives(weights, clip):
    asked = [(beginning, BEHIND) for beginning in BEGINNINGS]
    exact = made(clip).embed(asked)
    network = Clip(weights, method="test", device="cuda", vision=False)
    for dtype, least in (("float32", 1 - 1e-6), ("bfloat16", 0.99)):
        found = Continuations(network, method="test", device="cuda", dtype=dtype).embed(asked)
        for one, other in zip(found, exact, strict=True):
            assert (one.cpu() * other).sum(1).min() > least
