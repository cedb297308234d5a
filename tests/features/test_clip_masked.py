"""Embeddings of parts, and attention: against stored arrays and the formulas written out."""

import numpy as np
import pytest
import torch
from skimage import data
from support.golden import arrays
from support.tiny._clip import write_model
from transformers import CLIPModel

from raypipe.benchmark.plain import clip_masked as plain
from raypipe.features.clip import Clip
from raypipe.features.clip_masked import Masked, attention, planes, squashed, token_masks

PARTS = np.arange(48).reshape(6, 8) // 5 % 4  # four segments without any shape
OF = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tiny(weights) -> Clip:
    return Clip(weights, method="zero_guidance", device="cpu", text=False)


@pytest.fixture(scope="module")
def squares(tiny) -> list[np.ndarray]:
    return [squashed(image, tiny.size) for image in (data.astronaut()[:300], data.coffee())]


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    return np.concatenate([token_masks(PARTS, 4, 4), token_masks(PARTS.T, 4, 4)])


def test_parts_are_embedded_as_the_reference_does(shared):
    case = arrays(shared / "golden" / "zero_guidance" / "clip_masked_attention.npz")
    clip = Clip(shared / "golden" / "models" / "clip-l14-like-tiny", method="test", device="cpu", text=False)
    square = squashed(case["image"], clip.size)
    np.testing.assert_allclose(planes([square], "cpu")[0], case["pixel_values"], atol=0.02)
    masks = token_masks(case["labels"], 4, clip.size // clip.patch)
    np.testing.assert_allclose(masks, case["token_masks"], atol=1e-6)
    last = len(clip.transformer().layers) - int(case["first_masked_layer"])
    for name, sigma2 in (("2p5", float(case["sigma2"])), ("1p0", 1.0), ("none", None)):
        masked = Masked(clip, last=last, sigma2=sigma2)
        found = masked.seen(masked.streams([square]), masks, [0] * 4)
        np.testing.assert_allclose(found.embeddings, case[f"embeddings_sigma2_{name}"], atol=1e-4)
        np.testing.assert_allclose(found.saliency, case[f"saliency_cos_sigma2_{name}"], atol=1e-4)
        if name == "2p5":
            np.testing.assert_allclose(found.subtracted, case["subtraction_weight_sigma2_2p5"], atol=1e-4)
            np.testing.assert_allclose(found.rows, case["attention_cls_row_sigma2_2p5"], atol=1e-4)
    (whole, *_), last_blocks = masked.embed(masked.streams([square]), masks, [0] * 4), Masked(clip, last=0)
    unmasked = last_blocks.embed(last_blocks.streams([square]), masks, [0] * 4)
    np.testing.assert_allclose(unmasked, np.broadcast_to(case["embedding_unmasked"], (4, 32)), atol=1e-4)
    assert (whole - unmasked[0]).abs().max() > 0.1


@pytest.mark.parametrize("last", [0, 1, 2, 3])
@pytest.mark.parametrize("sigma2", [None, 0.7])
def test_any_number_of_blocks_is_masked_as_the_formulas_read(weights, tiny, squares, masks, last, sigma2):
    masked, network = Masked(tiny, last=last, sigma2=sigma2), CLIPModel.from_pretrained(weights).eval()
    found = masked.embed(masked.streams(squares), masks, OF)
    options = {"last": last, "sigma2": sigma2}
    expected = [plain.embedding(network, squares[i], mask, **options) for i, mask in zip(OF, masks, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if last:  # a part that is everything is masked, but from nothing
        (whole,) = Masked(tiny, last=last, sigma2=None).embed(masked.streams(squares[:1]), np.ones_like(masks[:1]), [0])
        np.testing.assert_allclose(whole / whole.norm(), tiny.embed_prepared(squares[:1])[0], atol=1e-6)


def test_no_part_depends_on_those_beside_it(tiny, squares, masks):
    masked = Masked(tiny, last=2)
    streams = masked.streams(squares)
    together = masked.embed(streams, masks, OF)
    seen = masked.seen(streams, masks, OF)
    assert torch.equal(seen.embeddings, together) and seen.rows.shape == (8, 2, 2, 17)
    for part in range(8):
        alone = masked.streams(squares[OF[part]][None])
        assert torch.equal(masked.embed(alone, masks[part][None], [0])[0], together[part])
    assert masked.embed(streams, masks[:0], []).shape == (0, 24)
    streams[0, 3] = torch.nan
    broken = masked.embed(streams, masks, OF)
    assert broken[:4].isnan().any(1).all() and torch.equal(broken[4:], together[4:])


class Together(Masked):
    """As on a GPU: parts of several images at once, some more in another batch."""

    def _batches(self, parts, streams):
        return iter([[*range(6)], [*range(6, parts)]])


@pytest.mark.parametrize("last", [1, 3])
def test_parts_that_go_through_the_blocks_together_are_the_same(tiny, squares, masks, last):
    streams = Masked(tiny, last=last).streams(squares)
    masks = masks.copy()
    masks[:, 2] = 0  # what no part sees
    alone, together = (kind(tiny, last=last).seen(streams, masks, OF) for kind in (Masked, Together))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", "bfloat16"), *(pytest.param("cuda", dtype, marks=CUDA) for dtype in ("float32", "bfloat16"))],
)
def test_reduced_precision_and_a_gpu_stay_near(weights, tiny, squares, masks, device, dtype):
    clip = Clip(weights, method="test", device=device, text=False, dtype=dtype)
    pair = [Masked(each, last=2) for each in (tiny, clip)]
    expected, found = (masked.seen(masked.streams(squares), masks, OF) for masked in pair)
    assert {each.dtype for each in found} == {torch.float32}
    similarity = torch.cosine_similarity(expected.embeddings, found.embeddings.cpu()).min()
    assert similarity > (1 - 1e-6 if dtype == "float32" else 0.99)


def test_what_the_class_token_sees_adds_up(tiny, squares, masks):
    masks = np.concatenate([np.zeros_like(masks[:1]), masks[1:]])  # what is left to the first is the class token
    found = (masked := Masked(tiny, last=3)).seen(masked.streams(squares), masks, OF)
    np.testing.assert_allclose(found.rows.sum(-1), (1 - found.subtracted)[..., None].expand(8, 3, 2), atol=1e-5)
    np.testing.assert_allclose(found.subtracted, (-((found.saliency + 1) ** 2) / 5).exp(), atol=1e-6)
    assert (found.rows[0, ..., 1:] <= 0).all() and (found.saliency > 0).all() and (found.saliency < 1).all()


@pytest.mark.parametrize("size", [(64, 48), (7, 30), (1, 1), (3, 100)])
def test_a_token_counts_by_how_much_of_it_a_segment_covers(size):
    labels = np.random.default_rng(0).integers(0, 3, size).astype(np.int16)
    found = token_masks(labels, 4, 6)
    each = torch.stack([torch.from_numpy(labels == i).float() for i in range(4)])
    np.testing.assert_allclose(found, torch.nn.functional.adaptive_avg_pool2d(each, 6), atol=1e-6)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)
    assert token_masks(labels, 0, 6).shape == (0, 6, 6)


@pytest.mark.parametrize("is_shared", [False, True])
def test_rows_of_attention_are_those_of_whole_maps(weights, is_shared, request):
    if is_shared:
        weights = request.getfixturevalue("shared") / "golden" / "models" / "clip-l14-like-tiny"
    clip = Clip(weights, method="test", device="cpu", text=False)
    network = CLIPModel.from_pretrained(weights, attn_implementation="eager").eval()
    square = squashed(data.coffee(), clip.size)
    with torch.inference_mode():
        maps = network.vision_model(planes([square], "cpu"), output_attentions=True).attentions
    found = attention(clip, square, [0, 6])
    np.testing.assert_allclose(found, torch.stack(maps)[:, 0].mean(1)[:, [0, 6]], atol=1e-6)
    np.testing.assert_allclose(found.sum(2), 1, atol=1e-5)


def test_more_masked_blocks_than_there_are_are_refused(tiny):
    for last in (-1, 4):
        with pytest.raises(ValueError, match=f"zero_guidance: mask_last_layers must be .* 0 to the 3 .*, got {last}"):
            Masked(tiny, last=last)
