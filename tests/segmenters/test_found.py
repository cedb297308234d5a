"""FOUND: stored cases, its two variants on a tiny network, and weights that are not its own."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from support.golden import arrays
from support.tiny import found as tiny
from support.tiny.dino_pca import write_model as write_dinov2

from raypipe import masks, networks
from raypipe.benchmark.plain import found as plain
from raypipe.features.grid import Features
from raypipe.segmenters import found
from raypipe.segmenters.found import Found
from raypipe.types import BadImage

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parents[1] / "golden"


def stored_case(path: Path) -> tuple[dict, list[Features]]:
    """The arrays of a case, and for each image the features of the network as Found gets them."""
    stored = arrays(path)
    tokens, attention = torch.from_numpy(stored["feats"]), torch.from_numpy(stored["cls_attention"])
    seen, grid = (tuple(stored[name].tolist()) for name in ("image_size", "dims"))
    patch = int(stored["patch_size"])
    each = zip(tokens[:, 1:], attention[:, :, 1:], strict=True)
    return stored, [Features(keys, grid, patch, seen, "pad", rows) for keys, rows in each]


@pytest.fixture(params=["batch2_p8_padded", "single_p16_noweights"])
def case(request, shared):
    return stored_case(shared / f"golden/found/{request.param}.npz")


@pytest.fixture
def decoder(shared):
    """A function that gives a Found with the published decoder, for stored keys, without its network."""

    def make(**options) -> Found:
        method = Found(**options)
        path = shared / "golden/found/decoder_weights.pt"
        method._weight, method._bias = found.read_decoder(path, width=384)
        return method

    return make


def images(features):
    return [np.zeros((*each.seen, 3), np.uint8) for each in features]


def check_background(stored, features):
    """Each step of the background, and the foreground at the image's size, against what is stored."""
    weighted, threshold = bool(stored["apply_weights"]), float(stored["bkg_threshold"])
    for i, each in enumerate(features):
        weights = found.head_weights(each.cls_attention)
        np.testing.assert_allclose(weights, stored["beta"][i], atol=1e-4)
        if not weighted:
            weights = torch.ones(len(weights))
        attention = weights @ each.cls_attention
        np.testing.assert_allclose(attention, stored["weighted_attention"][i], atol=1e-4)
        reference = int(attention.argmin())
        assert reference == stored["ref_patch"][i]
        cosines = found.similarity(each.patches, weights, reference).reshape(each.grid)
        np.testing.assert_allclose(cosines, stored["cosine_to_ref"][i], atol=1e-4)
        mask = found.background(each.patches, each.cls_attention, threshold=threshold, weighted=weighted)
        np.testing.assert_array_equal(mask.reshape(each.grid), stored["background_mask"][i])
    method = Found(variant="background", stretch=True, bkg_threshold=threshold, apply_weights=weighted)
    for i, segments in enumerate(method.find(images(features), features)):
        np.testing.assert_array_equal(segments.masks, stored["foreground_fullres"][[i]])
        assert segments.note == ""


def test_the_background_is_the_stored_one(case):
    check_background(*case)


def test_the_background_of_a_small_case_is_the_stored_one():
    check_background(*stored_case(GOLDEN / "found_background.npz"))


def test_probabilities_masks_and_boxes_of_the_published_decoder_are_the_stored_ones(case, decoder):
    stored, features = case
    for i, segments in enumerate(decoder().find(images(features), features)):
        logits = decoder()._logits(features[i])
        np.testing.assert_allclose(logits, stored["decoder_logits"][i, 0], atol=1e-3)
        np.testing.assert_array_equal(logits.sigmoid() > 0.5, stored["decoder_mask_patch"][i])
        probability = stored["decoder_prob_fullres"][i].astype(np.float32)
        np.testing.assert_allclose(segments.masks[0], probability, atol=2e-3)
        unlike = (segments.masks[0] > 0.5) != stored["decoder_mask_fullres"][i]
        assert (np.abs(segments.masks[0][unlike] - 0.5) < 1e-4).all()
    for i, segments in enumerate(decoder(result="box").find(images(features), features)):
        ys, xs = np.nonzero(segments.masks[0])
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == stored["boxes"][i].tolist()


def test_a_single_mask_is_the_largest_component_of_the_stored_one(case, decoder):
    stored, features = case
    for i, segments in enumerate(decoder(components="single").find(images(features), features)):
        largest = masks.largest_component(stored["decoder_mask_fullres"][i])
        assert segments.masks.dtype == bool and (segments.masks[0] != largest).mean() < 1e-3
        assert len(np.unique(stored["decoder_mask_fullres"][i])) == 2  # so that it says something
    for one in (Found(components="single"), Found(result="box"), Found(variant="background")):
        assert not one.soft
    assert Found().soft


def test_both_files_of_the_published_decoder_hold_the_same(shared):
    paths = [shared / f"golden/found/decoder_weights.{suffix}" for suffix in ("pt", "safetensors")]
    one, other = (found.read_decoder(path, width=384) for path in paths)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert one[1].item() == pytest.approx(0.475256, abs=1e-6) and one[0].norm().item() == pytest.approx(
        8.0557, abs=1e-4
    )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A function that gives a Found with other options, loaded on tiny weights."""
    weights = tiny.options(tmp_path_factory.mktemp("found"))

    def make(**options) -> Found:
        method = Found(**weights | options)
        method.load("cpu")
        return method

    return make


@pytest.fixture
def disc() -> np.ndarray:
    y, x = np.mgrid[:50, :70]
    inside = (y - 22) ** 2 + (x - 30) ** 2 < 12**2
    picture = np.where(inside[..., None], (220, 60, 20), np.stack([x, y, x], 2))
    return (picture + np.random.default_rng(0).integers(0, 20, picture.shape)).clip(0, 255).astype(np.uint8)


def test_the_folded_decoder_gives_the_logits_of_the_keys(loaded, disc):
    method = loaded()
    (features,) = method.features([disc])
    (keys,) = method._dino([disc], fit="pad", facet="key")
    weight, bias = found.read_decoder(method._paths["weights"], width=32)
    plain = (keys.patches @ weight + bias).reshape(keys.grid)
    assert plain.abs().max() > 1
    torch.testing.assert_close(method._logits(features), plain, atol=1e-5, rtol=0)


def test_cells_are_as_large_as_patches_and_padding_is_cut_off(loaded, disc):
    """Each pixel against the definition of bilinear sampling, at the image's size and at twice that."""
    method = loaded(max_side=40)
    (features,) = method.features([disc])
    assert features.grid == (4, 5) and features.seen == (29, 40)
    cells = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    at_seen = found.upsample(cells, features, (29, 40))
    for y, x in ((0, 0), (4, 20), (28, 39), (11, 7)):
        row, column = (np.clip((place + 0.5) / 8 - 0.5, 0, side - 1) for place, side in ((y, 4), (x, 5)))
        top, left = int(row), int(column)
        below, right = min(top + 1, 3), min(left + 1, 4)
        dy, dx = row - top, column - left
        first = cells[top, left] * (1 - dx) + cells[top, right] * dx
        second = cells[below, left] * (1 - dx) + cells[below, right] * dx
        assert at_seen[y, x] == pytest.approx(float(first * (1 - dy) + second * dy), abs=1e-6)
    assert found.upsample(cells, features, (58, 80)).shape == (58, 80)
    squeezed = found.upsample(cells, features, (29, 40), stretch=True)
    assert (squeezed - at_seen).abs().max() > 0.05  # 32 rows in the place of 29


@pytest.mark.parametrize("size", [(90, 70), (17, 100), (64, 64)])
@pytest.mark.parametrize("variant", ["decoder", "background"])
def test_masks_are_those_of_the_plain_formulation(loaded, variant, size):
    image = cv2.resize(skimage.data.coffee(), size[::-1], interpolation=cv2.INTER_AREA)
    method = loaded(variant=variant)
    (segments,) = method.segment([image])
    mask = plain.PlainFound(method)(image)
    assert ((segments.masks > 0.5) != mask).mean() <= 0.005 and mask.any() and not mask.all()


@pytest.mark.parametrize("variant", ["decoder", "background"])
def test_a_box_is_the_largest_part_of_the_grid(loaded, disc, variant):
    method = loaded(variant=variant, result="box")
    (features,) = method.features([disc])
    cells = method._logits(features) > 0 if variant == "decoder" else method._foreground(features)
    part = masks.largest_component(cells.numpy())
    assert 0 < part.sum() < part.size
    (segments,) = method.segment([disc])
    np.testing.assert_array_equal(segments.masks[0], np.kron(part, np.ones((8, 8), bool))[:50, :70])


def test_a_single_mask_is_one_part_of_the_mask(loaded, disc):
    (whole,) = loaded().segment([disc])
    (single,) = loaded(components="single").segment([disc])
    np.testing.assert_array_equal(single.masks[0], masks.largest_component(whole.masks[0] > 0.5))
    (whole,) = loaded(variant="background").segment([disc])
    (single,) = loaded(variant="background", components="single").segment([disc])
    assert whole.masks.any() and not whole.masks.all()
    np.testing.assert_array_equal(single.masks[0], masks.largest_component(whole.masks[0]))


def test_without_any_foreground_there_is_no_mask_and_the_box_is_the_whole_image(loaded, disc):
    for options in ({"bkg_threshold": -1}, {"bkg_threshold": -1, "components": "single"}):
        (segments,) = loaded(variant="background", **options).segment([disc])
        assert segments.masks.shape == (0, 50, 70) and segments.note == "empty_mask"
    (segments,) = loaded(variant="background", bkg_threshold=-1, result="box").segment([disc])
    assert segments.masks.all() and len(segments.masks) == 1 and segments.note == "empty_mask"
    method = loaded()
    (features,) = method.features([disc])
    method._bias = method._bias - method._logits(features).max() - 1
    (segments,) = method.segment([disc])  # soft masks stay: a lower threshold may find something
    assert 0 < segments.masks.max() < 0.5 and segments.note == "empty_mask"


def test_patches_that_attend_alike_have_the_first_as_reference_and_all_heads_count_alike():
    attention = torch.full((2, 6), 0.125)
    weights = found.head_weights(attention)
    torch.testing.assert_close(weights, torch.full((2,), float(np.log(2))))
    keys = torch.tensor([[1.0, 0, 0, 0]] * 3 + [[0, 1.0, 0, 0]] * 3)
    assert found.background(keys, attention).tolist() == [True] * 3 + [False] * 3
    assert found.background(keys[:1], attention[:, :1]).tolist() == [True]


def test_attention_that_is_no_number_is_a_bad_image(loaded, disc):
    method = loaded(variant="background")
    (features,) = method.features([disc])
    features.cls_attention[1, 3] = float("nan")
    with pytest.raises(BadImage, match="segment: non_finite: .* attention"):
        next(method.find([disc], [features]))


def test_the_background_of_a_dinov2_is_as_good_and_the_decoder_wants_its_own_backbone(tmp_path, disc):
    folder = str(write_dinov2(tmp_path / "dinov2"))
    method = Found(variant="background", backbone=folder, bkg_threshold=0.8)
    networks.look_for_each(method)
    method.load("cpu")
    (segments,) = method.segment([disc])
    assert segments.masks.shape == (1, 50, 70) and 0 < segments.masks.mean() < 1
    with pytest.raises(ValueError, match="holds a network of type 'dinov2_with_registers', expected 'vit'"):
        networks.look_for_each(Found(**tiny.options(tmp_path) | {"backbone": folder}))


def test_the_background_needs_no_decoder(loaded, disc, tmp_path):
    method = loaded(variant="background", weights=str(tmp_path / "absent.pt"))
    (segments,) = method.segment([disc])
    assert segments.masks.shape == (1, 50, 70) and list(method.checksums()) == ["model.safetensors"]
    assert set(loaded().checksums()) == {"weights/decoder.pt", "backbone/model.safetensors"}


def test_a_folder_of_fetched_weights_names_both_networks(tmp_path):
    tiny.options(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "decoder.pt").rename(tmp_path / "weights/decoder.pt")
    for variant in ("decoder", "background"):
        method = Found(weights=str(tmp_path), variant=variant)
        assert method.backbone == str(tmp_path / "backbone")
        method.load("cpu")


def test_the_other_vit_s8_is_refused_by_its_name(tmp_path):
    message = "found: backbone '.*' is facebook/dino-vits8, but dino_deitsmall8_300ep_pretrain.pth is needed"
    for backbone in ("facebook/dino-vits8", "https://x.org/dino_deitsmall8_pretrain.pth"):
        with pytest.raises(ValueError, match=message):
            Found(backbone=backbone)
    assert Found(variant="background", backbone="facebook/dino-vits16").networks == ("backbone",)
    method = Found(**tiny.options(tmp_path))
    (tmp_path / "backbone/source.json").write_text(json.dumps({"weights": "facebook/dino-vits8"}))
    with pytest.raises(ValueError, match=message):  # where the driver has no such folder, the worker still sees it
        method.load("cpu")


def test_an_unknown_backbone_is_warned_about_and_recorded_by_its_checksum(tmp_path, caplog):
    method = Found(**tiny.options(tmp_path))
    method.load("cpu")
    assert "found: backbone" in caplog.text and "has no name that is known here" in caplog.text
    with (tmp_path / "backbone/model.safetensors").open("rb") as content:
        assert method.checksums()["backbone/model.safetensors"] == hashlib.file_digest(content, "sha256").hexdigest()


def test_a_decoder_of_another_width_a_damaged_one_or_none_at_all_is_refused_when_it_is_loaded(tmp_path):
    options = tiny.options(tmp_path)
    tiny.write_decoder(tmp_path / "decoder.pt", width=384)
    with pytest.raises(ValueError, match=r"decoder.pt is no decoder for this backbone: expected .*1, 32, 1, 1.*384"):
        Found(**options).load("cpu")
    tiny.write_decoder(tmp_path / "decoder.pt")
    held = torch.load(tmp_path / "decoder.pt")
    held["decoder"]["weight"][0, 3] = torch.nan
    torch.save(held, tmp_path / "decoder.pt")
    with pytest.raises(ValueError, match="decoder.pt is damaged: it holds values that are no finite numbers"):
        Found(**options, components="single").load("cpu")
    (tmp_path / "decoder.pt").write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(ValueError, match="decoder.pt is not a checkpoint that can be read safely"):
        Found(**options).load("cpu")


REFUSED = [
    ({"variant": "decoders"}, "unknown variant 'decoders'; did you mean 'decoder'"),
    ({"components": "all"}, "unknown components 'all'"),
    ({"result": "boxes"}, "unknown result 'boxes'; did you mean 'box'"),
    ({"variant": "background", "bkg_threshold": 1.0}, "bkg_threshold must be at least -1 and below 1, got 1.0"),
    ({"bkg_threshold": 0.4}, "bkg_threshold 0.4 has no effect with the variant 'decoder'"),
    ({"result": "box", "components": "single"}, "components 'single' has no effect with the result 'box'"),
    ({"stretch": True}, "stretch True has no effect with the variant 'decoder'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_cannot_be_or_have_no_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=f"found: {message}"):
        Found(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"components": "single"}, {"variant": "background"}, {"result": "box"}])
def test_a_gpu_finds_what_the_cpu_finds_in_full_batches(tmp_path, options):
    weights, pictures = tiny.options(tmp_path), (skimage.data.coffee, skimage.data.astronaut, skimage.data.coffee)
    images = [cv2.resize(picture(), (90, 70), interpolation=cv2.INTER_AREA) for picture in pictures]
    here, there = (Found(**weights, dtype="float32", **options) for _ in range(2))
    here.load("cpu"), there.load("cuda")
    for one, other in zip(here.segment(images), there.segment(images), strict=True):
        assert one.masks.shape == other.masks.shape and ((one.masks > 0.5) != (other.masks > 0.5)).mean() < 0.01
        assert not here.soft or np.abs(one.masks - other.masks).max() < 1e-3
