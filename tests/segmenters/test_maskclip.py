"""MaskCLIP against stored arrays and a plain formulation, what its options do, and images of any size."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.golden import arrays
from support.tiny._clip import write_model
from torch.nn.functional import interpolate

from raypipe.benchmark.plain.maskclip import PlainMaskclip, unlike
from raypipe.networks import look_for_each
from raypipe.segmenters.maskclip import Maskclip, denoised, smoothed
from raypipe.sweep.together import share_stages
from raypipe.types import BadImage

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["cat", "dog", "sky", "tree", "car", "bird", "boat", "cow"]
CASES = ("dense_square", "dense_rect", "dense_literal_ref")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def make(weights):
    """A function from options to the loaded method, on tiny weights and eight categories."""

    def make(**options) -> Maskclip:
        defaults = {"weights": weights, "classes": ",".join(NAMES), "short_side": 48, "max_side": 200, "threshold": 0.0}
        method = Maskclip(**defaults | options)
        method.load("cpu")
        return method

    return make


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture of coarse coloured cells."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (-(-height // 12), -(-width // 12), 3))
    return cells.repeat(12, 0).repeat(12, 1)[:height, :width].astype(np.uint8)


def golden(shared: Path, name: str, **options) -> tuple[dict, Maskclip]:
    case = arrays(shared / f"golden/maskclip/{name}.npz")
    is_literal = name == "dense_literal_ref"
    settings = {
        "weights": str(shared / "golden/models/clip-tiny"), "classes": ",".join(NAMES), "literal": is_literal,
        "short_side": min(case["image"].shape[:2]), "normalization": "imagenet" if is_literal else "clip",
        "crop_padding": False, "threshold": 0.0, "temperature": float(case["temperature"]),
    }  # fmt: skip
    method = Maskclip(**settings | options)
    method.load("cpu")
    method._texts = case["text_embeddings"]
    return case, method


@pytest.mark.parametrize("name", CASES)
def test_features_and_label_maps_of_the_reference(shared, name):
    case, method = golden(shared, name)
    size = case["image"].shape[:2]
    height, width = size
    pixels = method.pixels(case["image"], method.seen_size(size))
    torch.testing.assert_close(pixels[0, :, :height, :width], torch.tensor(case["pixels"]), atol=1e-6, rtol=0)
    assert not pixels[..., height:, :].any() and not pixels[..., width:].any()
    (dense,) = method.features([case["image"]])
    np.testing.assert_allclose(dense.patches, case["dense_features"], atol=2e-4)
    scores, _ = method.scores(dense)
    np.testing.assert_allclose(scores, case["cosine"], atol=2e-5)
    (found,) = method.segment([case["image"]])
    labels = np.array([NAMES.index(name) for name in found.labels])[found.index - 1]
    assert (labels == case["label_nobg"]).mean() >= 0.998
    np.testing.assert_allclose(found.values, case["max_prob"], atol=2e-3)
    for threshold, expected in zip(case["thresholds"], case["label_bg"], strict=True):
        assert (np.where(found.values > threshold, labels + 1, 0) == expected).mean() >= 0.998


@pytest.mark.parametrize("name", ["dense_square", "dense_rect"])
def test_the_last_layer_of_the_paper(shared, name):
    case, method = golden(shared, name, residual="plain")
    (dense,) = method.features([case["image"]])
    np.testing.assert_allclose(method.scores(dense)[0], case["cosine_plain"], atol=2e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("axis", "array"), [("channels", "refined"), ("positions", "refined_literal")])
def test_refinements_of_the_reference(shared, name, axis, array):
    case = arrays(shared / f"golden/maskclip/{name}.npz")
    options = {"pd": float(case["pd_thresh"]), "ks": float(case["ks_thresh"])}
    case, method = golden(shared, name, **options, **{"key_norm": axis} if options["ks"] else {})
    (dense,) = method.features([case["image"]])
    if options["ks"]:
        np.testing.assert_allclose(dense.keys.flatten(1).T, case["key_tokens"], atol=2e-4)
    np.testing.assert_allclose(method.scores(dense)[0], case[array], atol=2e-3 if options["ks"] else 2e-5)
    (found,) = method.segment([case["image"]])
    labels = np.array([NAMES.index(name) for name in found.labels])[found.index - 1]
    expected = interpolate(torch.tensor(case[array])[None], size=labels.shape, mode="bilinear")[0].argmax(0).numpy()
    assert (labels == expected).mean() >= 0.998
    if axis == "channels":
        assert (expected == case["label_refined_nobg"]).all() and found.values.max() <= 1


@pytest.mark.parametrize("size", [(60, 83), (48, 48), (20, 400), (100, 31)])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_label_maps_are_those_of_the_plain_formulation(make, size, threshold):
    method = make(threshold=threshold, temperature=20.0)
    image = noise(*size)
    (found,) = method.segment([image])
    assert unlike(found, PlainMaskclip(method, "cpu")(image), method) <= 0.001
    assert found.count > 1 and (found.values > 0).all()


def test_images_of_a_batch_do_not_change_each_other(make, monkeypatch):
    """As on a GPU, where images of one grid go through the network together."""
    images = [noise(60, 80), noise(30, 90, 1), noise(60, 80, 2), noise(59, 80, 3)]
    alone = [next(make().segment([image])) for image in images]
    method = make()
    sizes = []
    dense = method._clip.dense
    monkeypatch.setattr(
        method._clip, "dense", lambda pixels, **options: sizes.append(len(pixels)) or dense(pixels, **options)
    )
    monkeypatch.setattr(method, "_at_once", lambda size: 2)
    for one, each in zip(alone, map(method.named, method.features(images), [i.shape[:2] for i in images]), strict=True):
        np.testing.assert_array_equal(one.index, each.index)
        np.testing.assert_allclose(one.values, each.values, atol=1e-4)
    assert sizes == [2, 1, 1] or sizes == [2, 1]


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((1, 1), (48, 48)),
        ((1, 40), (5, 200)),
        ((1, 9000), (1, 200)),
        ((96, 128), (48, 64)),
        ((33, 47), (48, 68)),
        ((400, 100), (192, 48)),
    ],
)
def test_the_shorter_side_has_its_length_unless_the_longer_is_too_long(make, size, seen):
    method = make()
    assert method.seen_size(size) == seen
    pixels = method.pixels(noise(*size), seen)
    assert pixels.shape == (1, 3, *(-(-side // 16) * 16 for side in seen))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (17, 5)])
@pytest.mark.parametrize("options", [{}, {"ks": 1.0, "pd": 0.2}, {"background_score": "cosine"}, {"classes": "cat"}])
def test_images_of_any_size_have_every_pixel_named(make, size, options):
    method = make(**options)
    image = noise(*size)
    for each in (image, np.zeros_like(image), image[..., :1].repeat(3, 2)):
        (found,) = method.segment([each])
        assert found.index.shape == size and found.index.min() == 1 and found.index.max() == found.count
        assert found.values.dtype == np.float32 and found.values.min() >= 0 and found.values.max() <= 1
        assert set(found.labels) <= set(NAMES)
        assert found.note == ("few_classes" if "classes" in options else found.note)


def test_one_category_is_everywhere_by_its_probability_but_not_by_its_cosine(make):
    (found,) = make(classes="cat").segment([noise(40, 50)])
    assert found.values.min() == 1 and found.note == "few_classes"
    method = make(classes="cat", background_score="cosine")
    (found,) = method.segment([noise(40, 50)])
    (dense,) = method.features([noise(40, 50)])
    assert found.note == "" and found.values.max() <= max(0, float(method.scores(dense)[0].max())) + 1e-6
    assert found.values.max() < 1


def test_names_that_are_equal_have_their_queries_as_labels(make):
    method = make(
        classes="[{name: crane, query: crane bird}, {name: crane, query: crane machine}, {name: Dog, query: a dog}]"
    )
    assert method._names == ("crane bird", "crane machine", "Dog")
    expected = method._clip.texts(["crane bird", "crane machine", "a dog"])
    np.testing.assert_array_equal(method._texts, expected)


def test_categories_that_are_nowhere_likely_are_left_out_but_never_all():
    cosines = torch.tensor([[[0.30, 0.10]], [[0.10, 0.29]], [[0.28, 0.27]]])
    probability = (cosines * 100).softmax(0).amax((1, 2))
    found, note = denoised(cosines, 0.5, 100.0)
    assert note == "" and (found[2] == -100).all() and torch.equal(found[:2], cosines[:2]) and probability[2] < 0.5
    found, note = denoised(cosines, 0.95, 100.0)
    assert note == "all_suppressed" and torch.equal(found[0], cosines[0]) and (found[1:] == -100).all()


@pytest.mark.parametrize("axis", ["channels", "positions"])
def test_places_that_are_not_sure_ask_those_with_like_keys(axis):
    generator = torch.Generator().manual_seed(3)
    cosines, keys = torch.randn((3, 2, 4), generator=generator) * 0.02, torch.randn((5, 2, 4), generator=generator)
    found = smoothed(cosines, keys, 0.8, 100.0, axis=axis)
    probability = (cosines * 100).softmax(0)
    units = keys.flatten(1) / keys.flatten(1).norm(dim=0 if axis == "channels" else 1, keepdim=True)
    for place in np.ndindex(2, 4):
        expected = probability[:, *place]
        if expected.max() < 0.8:
            own = units[:, place[0] * 4 + place[1]]
            expected = sum(float(own @ units[:, i]) * probability.flatten(1)[:, i] for i in range(8))
        torch.testing.assert_close(found[:, *place], expected, atol=1e-5, rtol=0)
    assert 0 < (probability.amax(0) < 0.8).sum() < 8


def test_padding_is_cut_off_before_the_grid_is_enlarged(make):
    image = noise(49, 49)  # of which the network sees 64 x 64 with 15 rows and columns of padding
    exact, literal = (make(short_side=49, crop_padding=crop) for crop in (True, False))
    (dense,) = exact.features([image])
    scores = exact.scores(dense)[0]
    whole = interpolate(scores[None], size=(64, 64), mode="bilinear")[0, :, :49, :49]
    stretched = interpolate(scores[None], size=(49, 49), mode="bilinear")[0]
    for method, expected in ((exact, whole), (literal, stretched)):
        found = method.named(dense, (49, 49))
        labels = np.array([NAMES.index(name) for name in found.labels])[found.index - 1]
        assert (labels == expected.argmax(0).numpy()).mean() > 0.999
    assert (whole.argmax(0) != stretched.argmax(0)).any()


def test_features_that_are_no_numbers_fail_that_image_alone(make):
    method = make()
    features = method.features([noise(50, 60), noise(40, 70)])
    next(features)
    with torch.no_grad():
        method._clip._network._network.visual_projection.weight[0, 0] = np.nan
    with pytest.raises(BadImage, match="segment: non_finite: .*try --dtype float32"):
        next(features)


def test_settings_that_share_the_features_of_an_image_give_what_each_gives_alone(weights, make):
    images, options = (
        [noise(50, 70), noise(40, 44, 1)],
        {"weights": weights, "classes": ",".join(NAMES), "short_side": 48},
    )
    others = {"ks": 1.0, "key_norm": "positions", "pd": 0.3, "temperature": 50.0, "crop_padding": False}
    after, without = (make(**each).stages["features"] for each in ({"ks": 0.9}, {}))
    assert {*others, "background_score"} == {*after} == {*without, "ks", "key_norm"}
    given = [{"ks": 0.9} | {name: value} for name, value in others.items()]
    methods = [Maskclip(**options, **each) for each in given]
    forget = share_stages(methods)
    for method in methods:
        method.load("cpu")
    alone = [list(make(max_side=2048, **each).segment(images)) for each in given]
    for method, expected in zip(methods, alone, strict=True):
        assert all(a is b for a, b in zip(method.features(images), methods[0].features(images), strict=True))
        for found, one in zip(method.segment(images), expected, strict=True):
            np.testing.assert_array_equal(found.index, one.index)
            np.testing.assert_array_equal(found.values, one.values)
    forget()


def test_classes_and_templates_are_settled_without_their_files(tmp_path, weights):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "asked.txt").write_text("a {}\none {}.\n")
    method = Maskclip(weights=weights, classes=str(tmp_path / "names.txt"), templates=str(tmp_path / "asked.txt"))
    assert (method.classes, method.templates) == ('["cat", "dog"]', '["a {}", "one {}."]')
    assert replace(method, pd=0.5).classes == method.classes and Maskclip(weights=weights).classes == "voc2012"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ""}, "classes: expected one category at least"),
        ({"classes": "cat,,dog"}, "classes: category 2 of the names has an empty name"),
        ({"classes": "sea_lion,Sea lion"}, "asked the same about 'sea_lion' (1) and 'Sea lion' (2)"),
        ({"short_side": 0}, "maskclip: short_side must be at least 1, got 0"),
        ({"pd": 1.5}, "maskclip: pd must be between 0 and 1, got 1.5"),
        ({"ks": float("nan")}, "maskclip: ks must be between 0 and 1, got nan"),
        ({"temperature": 0.0}, "maskclip: temperature must be above 0, got 0.0"),
        ({"residual": "half"}, "maskclip: unknown residual 'half'; choose one of: full, plain"),
        ({"dtype": "float16"}, "maskclip: unknown dtype 'float16'"),
        ({"key_norm": "positions"}, "maskclip: key_norm 'positions' has no effect without ks"),
        ({"background_score": "cosine", "ks": 1.0}, "maskclip: background_score must be 'softmax100' with ks"),
        ({"background_score": "cosine", "temperature": 50.0}, "maskclip: temperature has no effect"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Maskclip(**options)


def test_other_networks_are_refused(tmp_path):
    from support.tiny.dino import write_model as write_dino

    method = Maskclip(weights=str(write_dino(tmp_path)))
    with pytest.raises(ValueError, match="maskclip: .* holds a network of type 'vit', expected 'clip'"):
        look_for_each(method)
    with pytest.raises(ValueError, match="maskclip: "):
        method.load("cpu")


@pytest.mark.gpu
def test_a_gpu_gives_the_labels_of_the_cpu(weights):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = [noise(90, 120, 1), noise(90, 120, 2), noise(64, 200, 3)]
    on = {}
    for device, dtype in (("cpu", "auto"), ("cuda", "float32"), ("cuda", "bfloat16")):
        method = Maskclip(weights=weights, classes="coco2017", short_side=64, threshold=0.0, dtype=dtype)
        method.load(device)
        on[device, dtype] = list(method.segment(images))
    for (_, dtype), found in on.items():
        for one, other in zip(on["cpu", "auto"], found, strict=True):
            names, others = (np.array(each.labels)[each.index - 1] for each in (one, other))
            assert (names == others).mean() >= (0.95 if dtype == "bfloat16" else 0.999)
