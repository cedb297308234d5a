"""Zero-guidance segmentation as a whole, on random weights: what comes out, of what input, what is asked how often."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from skimage import data
from support import tiny

from raypipe import networks
from raypipe.benchmark.plain.zero_guidance import Plain, compare, names_of
from raypipe.features.clip_masked import Masked, squashed, token_masks
from raypipe.features.dino import Dino
from raypipe.pipeline.graph import block_size
from raypipe.pipeline.job import Label, plan_work
from raypipe.pipeline.stages import Segment
from raypipe.segmenters.zero_guidance import ZeroGuidance
from raypipe.segmenters.zero_guidance.maps import of_regions
from raypipe.segmenters.zero_guidance.names import Namer
from raypipe.types import BadImage

pytestmark = pytest.mark.usefixtures("one_thread")
SEARCH = {"beam_size": 2, "max_new_tokens": 2, "steps": 1, "num_parts": 3}


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    return tiny.options("zero_guidance", tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def method(options):
    """A function that gives the method with options, loaded on the CPU; each once."""
    made = {}

    def get(**more) -> ZeroGuidance:
        key = repr(sorted(more.items()))
        if key not in made:
            made[key] = ZeroGuidance(**options | more)
            made[key].load("cpu")
        return made[key]

    return get


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Photographs of several sizes, two of them alike."""
    found = [data.astronaut()[::6, ::5], data.coffee()[::8, ::8], data.chelsea()[::6, ::9], data.rocket()[::5, ::6]]
    return [*map(np.ascontiguousarray, found), found[0][:, ::-1].copy(), found[1][5:40, 7:].copy(), found[0].copy()]


def rows(segmenter: ZeroGuidance, images, **job) -> list[dict]:
    """What a job makes of images, `batch_size` at a time."""
    work = replace(plan_work(Label("photos", "run", **job), segmenter, None), device="cpu")
    given = [{"image": each, "error": "", "height": len(each), "width": each.shape[1]} for each in images]
    return list(Segment(work)(given))


def assert_equal(one: dict, other: dict) -> None:
    assert one["error"] == other["error"] == "" and one["note"] == other["note"]
    one, other = one["found"], other["found"]
    assert [*one.labels] == [*other.labels] and [*one.scores] == [*other.scores]
    np.testing.assert_array_equal(one.masks, other.masks)
    np.testing.assert_array_equal(one.embeddings, other.embeddings)


def test_the_segments_are_the_whole_image_the_largest_first(method, images):
    segmenter, counts = method(), []
    for image, found in zip(images, segmenter.segment(images), strict=True):
        assert (
            found.masks.dtype == bool and (found.masks.sum(0) == 1).all() and found.masks.shape[1:] == image.shape[:2]
        )
        areas = found.masks.sum((1, 2)).tolist()
        assert areas == sorted(areas, reverse=True) and areas[-1] > 0
        assert set(found.labels) <= set(json.loads(segmenter.vocabulary))
        assert found.embeddings.shape == (len(areas), 24) and found.embeddings.dtype == np.float32
        texts = segmenter._clip.texts(found.labels, '["Image of a {}."]')
        units = found.embeddings / np.linalg.norm(found.embeddings, axis=1, keepdims=True)
        np.testing.assert_allclose(found.scores, (units * texts).sum(1), atol=1e-5)
        counts.append(len(areas))
    assert min(counts) < 5 < 10 < max(counts)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"merge": False, "mask_last_layers": 3, "sigma2": 1.0},
        {"subtract": False, "keep_aspect": True, "stride": 8},
        {"mask_last_layers": 0, "tau_merge": 0.99, "num_parts": 6},
    ],
)
def test_it_comes_out_as_the_plain_composition_has_it(more, method, images):
    segmenter = method(**more)
    plain = Plain(segmenter, "cpu")
    for image, found in zip(images[:3], segmenter.segment(images[:3]), strict=True):
        masks, names = plain(image)
        assert len(masks) == len(found.masks)
        assert (names_of(masks, names) == names_of(found.masks, found.labels)).all()


def test_the_benchmark_measures_it_beside_the_plain_composition(method, images):
    figures = {row.figure.partition(",")[0]: row for row in compare(method(), "cpu", images[:2], 1)}
    assert figures["share of pixels unlike plain"].values == [0.0, 0.0]
    assert len(figures["times faster than plain"].values) == 2 and figures["time per image"].note == "cpu; ours alone"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("naming", ["retrieval", "zerocap"])
def test_a_gpu_names_the_same_parts(naming, options, images):
    search = SEARCH if naming == "zerocap" else {}
    made = [ZeroGuidance(**options | search, naming=naming, dtype="float32") for _ in range(2)]
    for segmenter, device in zip(made, ("cuda", "cpu"), strict=True):
        segmenter.load(device)
    for found, expected in zip(*(segmenter.segment(images[:4]) for segmenter in made), strict=True):
        same = names_of(found.masks, found.labels) == names_of(expected.masks, expected.labels)
        assert same.mean() > 0.99


@pytest.mark.parametrize("naming", ["retrieval", "zerocap"])
def test_batches_and_order_change_no_bit(naming, method, images, monkeypatch):
    segmenter = method(naming=naming, **SEARCH if naming == "zerocap" else {})
    images = images[::3] if naming == "zerocap" else images
    expected = rows(segmenter, images, batch_size=1)
    for one, other in zip(rows(segmenter, images, batch_size=7), expected, strict=True):
        assert_equal(one, other)
    for one, other in zip(rows(segmenter, images[::-1], batch_size=3), expected[::-1], strict=True):
        assert_equal(one, other)
    assert_equal(expected[0], expected[-1])  # the same photograph
    # all images of a call together, as on a GPU
    monkeypatch.setattr(networks, "batches", lambda given, _: iter([given] if len(given) else []))
    for one, other in zip(rows(segmenter, images, batch_size=7), expected, strict=True):
        assert one["found"].labels == other["found"].labels
        np.testing.assert_array_equal(one["found"].masks, other["found"].masks)
        np.testing.assert_allclose(one["found"].embeddings, other["found"].embeddings, atol=1e-5)


def test_what_the_tree_cannot_tell_apart_is_one_segment(method):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    flat = [np.full((60, 80, 3), (90, 90, 200), np.uint8), np.zeros((300, 1, 3), np.uint8)]
    for row in rows(method(), flat) + rows(method(t_dino=-1.0), [noise]):
        assert row["error"] == "" and row["note"] == "one_segment"
        assert row["found"].masks.all() and len(row["found"].masks) == len(row["found"].labels) == 1
    (many,) = rows(method(num_parts=None, max_segments=3, tau_merge=-1.0), [noise])
    assert many["note"] == "many_segments,one_segment"
    for row in rows(method(), [noise[:1, :1], noise[:7, :5], flat[0][:2, :2]]):
        assert row["note"] == "too_small" and row["found"].masks.all() and len(row["found"].labels) == 1


def test_images_of_any_shape_give_rows(method):
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3)).astype(np.uint8)
    noise[500:1500, 300:900] //= 4
    odd = [noise[:1], noise[:, :1], noise[:9, :2], np.repeat(noise[:90, :120, :1], 3, 2), noise]
    for segmenter in (method(), method(keep_aspect=True, stride=8)):
        for image, row in zip(odd, rows(segmenter, odd), strict=True):
            assert row["error"] == "" and (row["found"].masks.sum(0) == 1).all()
            assert row["found"].masks.shape[1:] == image.shape[:2]
    assert method(keep_aspect=True, stride=8).seen_size((60, 90)) == (64, 96)
    assert method(keep_aspect=True, stride=8).seen_size((1, 2000)) == (64, 128)


@pytest.mark.parametrize(("network", "name", "what"), [(Dino, "_embed", "features"), (Masked, "streams", "embeddings")])
def test_numbers_that_are_not_finite_are_an_error_of_their_image_alone(
    network, name, what, method, images, monkeypatch
):
    whole = getattr(network, name)

    def spoilt(self, given):
        """NaN where there is no red."""
        found = whole(self, given)
        red = [square[..., 0].max() for square in given] if network is Masked else (given[:, 0].amax((1, 2)) + 2.117)
        return torch.stack(
            [each * (np.nan if bool(abs(most) < 1e-2) else 1) for each, most in zip(found, red, strict=True)]
        )

    bad = images[1] * np.array([0, 1, 1], np.uint8)
    expected = rows(method(), images[:3])
    monkeypatch.setattr(network, name, spoilt)
    one, wrong, *others = rows(method(), [images[0], bad, *images[1:3]])
    assert wrong["error"].startswith("segment: non_finite: ") and what in wrong["error"]
    for each, other in zip([one, *others], expected, strict=True):
        assert_equal(each, other)


def test_regions_are_named_as_they_are(options, method, images):
    regions = np.zeros(images[0].shape[:2], int)
    regions[10:40, 5:30], regions[50:, :] = 459, 2
    segmenter = ZeroGuidance(**{name: value for name, value in options.items() if name != "size"}, regions="given:maps")
    segmenter.load("cpu")
    assert segmenter.networks == ("clip_model",) and {*segmenter.checksums()} == {"clip_model/model.safetensors"}
    found, none = segmenter.segment([images[0], images[1]], [regions, np.zeros(images[1].shape[:2], int)])
    np.testing.assert_array_equal(found.masks, np.stack([regions == 2, regions == 459]))
    whole = method(mask_last_layers=2)
    tokens = token_masks(np.where(regions == 2, 0, -1), 1, 4)
    stream = whole._masked().streams([squashed(images[0], 64)])
    np.testing.assert_allclose(found.embeddings[0], whole._masked().embed(stream, tokens, [0])[0], atol=1e-6)
    assert (
        len(none.masks) == len(none.labels) == len(none.embeddings) == 0 and none.masks.shape[1:] == images[1].shape[:2]
    )


def test_a_map_of_too_many_regions_is_a_bad_image():
    numbers = np.arange(36 * 36).reshape(36, 36)
    assert len(of_regions(numbers.clip(max=1000)).tree_ids) == 1000
    with pytest.raises(BadImage, match="many_regions: 1295 regions, at most 1000 are named"):
        of_regions(numbers)


def test_merging_asks_again_only_for_parents(method, images, monkeypatch):
    asked = []
    name = Namer.__call__
    monkeypatch.setattr(Namer, "__call__", lambda self, rows: asked.append(len(rows)) or name(self, rows))
    whole = [image for image in images if min(image.shape[:2]) >= 64]  # in smaller ones a part may get no pixel
    leaves = [len(found.masks) for found in method(merge=False).segment(whole)]
    assert asked == leaves
    for tau, alpha in ((0.8, 0.5), (-1.0, 0.5), (0.9, 0.0)):
        asked.clear()
        more = {"merge_mode": "text"} if alpha == 0 else {}
        left = [len(found.masks) for found in method(tau_merge=tau, **more).segment(whole)]
        assert sum(asked) == sum(leaves) + sum(leaves) - sum(left)
        assert sum(left) < sum(leaves) and (tau > 0 or min(left) == 1)


def test_a_batch_for_which_memory_lacks_while_naming_is_halved(method, images, monkeypatch):
    expected = rows(method(), images[:4])
    monkeypatch.setattr(networks, "batches", lambda given, _: iter([given] if len(given) else []))  # as on a GPU
    name, failed = Namer.__call__, []

    def lacking(self, embeddings):
        if len(embeddings) > 25:
            failed.append(len(embeddings))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return name(self, embeddings)

    monkeypatch.setattr(Namer, "__call__", lacking)
    for one, other in zip(rows(method(), images[:4]), expected, strict=True):
        assert one["error"] == "" and one["found"].labels == other["found"].labels
        np.testing.assert_array_equal(one["found"].masks, other["found"].masks)
    assert len(failed) > 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"size": 16}, "size must be at least 32, got 16"),
        ({"size": 8000}, "size must be at most 256 times stride, which is 4, got 8000; make stride larger"),
        ({"num_parts": 1}, "num_parts must be at least 2, got 1"),
        ({"steps": 0, "naming": "zerocap"}, "steps must be at least 1, got 0"),
        ({"t_dino": 1.5}, "t_dino is a cosine and must be between -1 and 1, got 1.5"),
        ({"alpha": float("nan")}, "alpha must be between 0 and 1, got nan"),
        ({"sigma2": 0.0}, "sigma2 must be above 0, got 0.0"),
        ({"naming": "caption"}, "unknown naming 'caption'; choose one of: retrieval, zerocap"),
        ({"regions": "given:maps", "tau_merge": 0.7}, "tau_merge 0.7 has no effect with regions"),
        ({"regions": "given:maps", "size": 224}, "size 224 has no effect with regions"),
        ({"max_segments": 9}, "max_segments 9 has no effect with num_parts; add --num-parts None"),
        ({"num_parts": None, "splits": "first_half"}, "splits 'first_half' has no effect without num_parts"),
        ({"mask_last_layers": 0, "sigma2": 1.0}, "sigma2 1.0 has no effect without masked layers"),
        ({"subtract": False, "sigma2": 1.0}, "sigma2 1.0 has no effect without subtract"),
        ({"lm": "openai-community/gpt2"}, "lm 'openai-community/gpt2' has no effect with naming 'retrieval'"),
        ({"beam_size": 2}, "beam_size 2 has no effect with naming 'retrieval'"),
        ({"forbidden": "none"}, "forbidden 'none' has no effect with naming 'retrieval'"),
        ({"naming": "zerocap", "below": 0.2}, "below 0.2 has no effect unless naming is 'retrieval\\+zerocap'"),
        ({"naming": "retrieval+zerocap", "below": 2.0}, "below is a cosine and must be between -1 and 1, got 2.0"),
        ({"merge": False, "tau_merge": 0.7}, "tau_merge 0.7 has no effect without merge"),
        ({"merge_mode": "text", "alpha": 0.7}, "alpha 0.7 has no effect unless merge_mode is 'mix'"),
    ],
)
def test_options_without_sense_or_effect_are_refused(more, message):
    with pytest.raises(ValueError, match=f"^zero_guidance: {message}"):
        ZeroGuidance(**more)


def test_only_what_the_options_need_is_a_network_and_takes_time(options):
    assert ZeroGuidance().networks == ("weights", "clip_model") and 1000 < ZeroGuidance().timeout < 2000
    assert ZeroGuidance(stride=2).timeout > 5000
    search = ZeroGuidance(naming="zerocap")
    assert search.networks == ("weights", "clip_model", "lm") and search.timeout > 24 * 3600
    job = Label("photos", "run")  # images that are committed together, and done again at most:
    on_gpu = [block_size(job, plan_work(job, each, None), on_gpu=True) for each in (search, ZeroGuidance())]
    assert on_gpu == [8, 32] and block_size(job, plan_work(job, search, None), on_gpu=False) == 1
    assert ZeroGuidance(naming="zerocap", num_parts=10, beam_size=1).timeout < search.timeout / 8
    assert ZeroGuidance(regions="given:maps", naming="zerocap").networks == ("clip_model", "lm")
    spread = ZeroGuidance(weights=options["weights"], naming="zerocap")
    assert [getattr(spread, name).rpartition("/")[2] for name in spread.networks] == [*spread.networks]


@pytest.mark.parametrize("lack", ["text_model", "visual_projection"])
def test_a_clip_that_is_not_whole_is_named(lack, options, tmp_path):
    folder = shutil.copytree(f"{options['weights']}/clip_model", tmp_path / "clip")
    held = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in held.items() if lack not in name}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"^zero_guidance: {folder} holds no CLIPModel: .* the first is {lack}"):
        ZeroGuidance(**options | {"clip_model": str(folder)}).load("cpu")


@pytest.mark.parametrize("words", [["<|hello|>"], None])
def test_a_tokenizer_that_does_not_belong_to_its_clip_is_named(words, options, tmp_path):
    folder = shutil.copytree(f"{options['weights']}/clip_model", tmp_path / "clip")
    vocabulary = json.loads((folder / "vocab.json").read_bytes())
    more = {word: len(vocabulary) + i for i, word in enumerate(words)} if words else {}
    kept = vocabulary | more if words else dict(list(vocabulary.items())[5:])
    (folder / "vocab.json").write_text(json.dumps(kept))
    message = f"^zero_guidance: {folder} holds no complete tokenizer of its own .*{len(kept)} words, the network's"
    with pytest.raises(ValueError, match=message):
        ZeroGuidance(**options | {"clip_model": str(folder)}).load("cpu")


def test_fewer_blocks_than_are_masked_are_an_error_when_it_loads(options):
    with pytest.raises(ValueError, match="^zero_guidance: mask_last_layers must be from 0 to the 3 blocks .* got 4"):
        ZeroGuidance(**options | {"mask_last_layers": 4}).load("cpu")
