"""Sempart's training: stored steps, against the plain loop, what gradients reach, what is exported, bad options."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.golden import arrays
from support.tiny.dino import write_model
from support.tiny.sempart import write_head

from raypipe import networks, segmenters
from raypipe.benchmark.plain.train_sempart import PlainLoop, stepped
from raypipe.segmenters.sempart import losses, network
from raypipe.storage import Folder
from raypipe.training import data
from raypipe.training.sempart import Sempart

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 64


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "backbone"))


@pytest.fixture
def recipe(backbone):
    """A small training: options -> recipe."""

    def make(**options) -> Sempart:
        small = {"backbone": backbone, "hidden": 8, "image_size": SIDE, "resize": 70, "batch_size": 2}
        return Sempart(**small | options)

    return make


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) as networks see them."""
    mean, std = np.float32(networks.IMAGENET_MEAN), np.float32(networks.IMAGENET_STD)
    return torch.from_numpy(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))


def photographs(count: int, *, seed: int = 0) -> list[np.ndarray]:
    """Blurred noise with a bright square in it, of different sizes."""
    random, found = np.random.default_rng(seed), []
    for i in range(count):
        size = (80 + 7 * i, 96 - 5 * i)
        noise = Image.fromarray(random.integers(0, 120, (9, 9, 3), dtype=np.uint8))
        image = np.array(noise.resize(size[::-1]))
        image[20:50, 25:60] += 120
        found.append(image)
    return found


def views_of(student, count: int = 2, *, epoch: int = 0) -> tuple[torch.Tensor, ...]:
    recipe = student.recipe
    samples = [recipe.prepare({}, image) for image in photographs(count)]
    return student.views(samples, [recipe.draw(data.generator(0, epoch, i), each) for i, each in enumerate(samples)])


# Against what is stored and what is plain


@pytest.mark.parametrize("name", ["train3", "train3_baseline"])
def test_three_steps_are_the_stored_ones(name, shared):
    stored = {key: torch.from_numpy(value) for key, value in arrays(shared / f"golden/sempart/{name}.npz").items()}
    models, tau = shared / "golden/models", round(float(stored["tau"]), 6)
    chosen = {"backbone": str(models / "dino-vits8-tiny"), "start_from": str(models / "sempart-head-small")}
    student = Sempart(**chosen, tau=tau, image_size=SIDE, resize=SIDE, crop_zoom=name == "train3").student("cpu")
    optimizer = student.optimizer(1e-4)
    for t in range(3):
        images, more = pixels(stored[f"image_{t}"].numpy()), ()
        if name == "train3":
            windows = torch.stack([stored[f"crop_top_{t}"], stored[f"crop_left_{t}"]], dim=1)
            zoomed = losses.zoom(images, *windows.T.tolist())
            more = (zoomed, stored[f"crop_features_{t}"].float(), windows)
        terms = student.terms(images, stored[f"features_{t}"].float(), *more)
        assert {f"loss/{each}" for each in terms} == {key for key in stored if key.startswith("loss/")}
        found = stepped(terms, optimizer)
        for each, value in found.items():
            assert value == pytest.approx(float(stored[f"loss/{each}"][t]), abs=1e-5), each
        if t == 0:
            for key, parameter in student.head.named_parameters():
                if (expected := stored.get(f"grad0/{key}")) is not None:
                    assert (parameter.grad - expected).abs().max() <= 2e-3 * expected.abs().max(), key
    after = student.head.state_dict()
    for key in stored:
        if key.startswith("after/"):
            torch.testing.assert_close(after[key.removeprefix("after/")], stored[key], atol=1e-4, rtol=0)


def test_three_steps_from_photographs_are_the_stored_ones(shared):
    stored = arrays(shared / "golden/sempart/end_to_end_224.npz")
    models = shared / "golden/models"
    chosen = {"backbone": str(models / "dino-vits8-tiny"), "start_from": str(models / "sempart-head-small")}
    student = Sempart(**chosen, tau=round(float(stored["tau"]), 6), image_size=224, resize=224).student("cpu")
    optimizer, images = student.optimizer(1e-4), pixels(stored["image"])
    for t in range(3):
        windows = torch.from_numpy(np.stack([stored["crop_top"], stored["crop_left"]], axis=2)[t])
        found = stepped(student(images, losses.zoom(images, *windows.T.tolist()), windows), optimizer)
        for each, value in found.items():
            assert value == pytest.approx(float(stored[f"loss/{each}"][t]), abs=2e-4), each


VARIED = {"tau": 0.7, "w_gtv_fine": 3.0, "sigma": 0.2, "eps": 1e-3, "gf_radius": 3}


@pytest.mark.parametrize("options", [{}, {"crop_zoom": False}, VARIED])
def test_steps_are_those_of_the_plain_loop(options, recipe):
    student = recipe(**options).student("cpu")
    plain = PlainLoop(student)
    optimizer = student.optimizer(1e-4)
    for epoch in range(3):
        views = views_of(student, epoch=epoch)
        expected = plain.step(*views)
        assert stepped(student(*views), optimizer) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        if epoch == 0:
            for (name, one), other in zip(student.head.named_parameters(), plain.head.parameters(), strict=True):
                if not (name.endswith("conv1.bias") or name.endswith("conv2.bias")):  # rounding: a norm follows
                    assert (one.grad - other.grad).abs().max() <= 1e-3 * other.grad.abs().max(), name
    for name, buffer in plain.head.named_buffers():
        torch.testing.assert_close(student.head.get_buffer(name), buffer, atol=1e-4, rtol=0)


# What a step touches


def test_a_step_trains_the_head_alone_and_each_view_moves_the_averages_once(recipe):
    for crop_zoom in (False, True):
        student = recipe(crop_zoom=crop_zoom).student("cpu")
        names = {name for name, _ in student.named_parameters()}
        assert names == {f"head.{name}" for name, _ in student.head.named_parameters()}
        assert not any(each.requires_grad for each in student.dino.network.parameters())
        student(*views_of(student))["total"].backward()
        assert all(each.grad is not None and each.grad.any() for each in student.parameters())
        assert {int(each.num_batches_tracked) for each in batch_norms(student)} == {1 + crop_zoom}


def batch_norms(student) -> list[torch.nn.Module]:
    return [each for each in student.modules() if isinstance(each, torch.nn.BatchNorm2d)]


def test_the_teachers_decoder_keeps_nothing_and_its_mask_is_only_a_target(recipe):
    student = recipe().student("cpu")
    views = views_of(student)
    grids = {}
    for number in (1, 3):
        grids[number] = []

        def keep(tensor, kept=grids[number]):
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = student(*views[:number])
    more = list(grids[3])
    for shape in grids[1]:
        more.remove(shape)
    wide = [shape for shape in more if len(shape) == 4 and shape[2] > SIDE // 8 and shape[1] > 3]
    assert more and not wide
    assert any(len(shape) == 4 and shape[2] == SIDE and shape[1] > 3 for shape in grids[1])
    # the window's own cut moves what makes coarse masks; its agreement moves the mask of the whole crop
    decoder = [each for name, each in student.head.named_parameters() if name.startswith(("up.", "fine."))]
    found = torch.autograd.grad(terms["ncut_crop"], decoder, retain_graph=True, allow_unused=True)
    assert found == (None,) * len(decoder)
    found = torch.autograd.grad(terms["crop_zoom"], decoder, retain_graph=True)
    alone = torch.autograd.grad(fixed_target(student, views, terms), decoder)
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other)


def fixed_target(student, views, terms) -> torch.Tensor:
    """The agreement with the window's mask, which is computed beforehand as a constant."""
    images, zoomed, windows = views
    head = copy.deepcopy(student.head)
    with torch.no_grad():
        target = losses.teacher_target(head(student.features(zoomed), zoomed)[1].sigmoid(), zoomed)
    fine = student.head(student.features(images), images)[1].sigmoid()
    result = (losses.zoom(fine, *windows.T.tolist()) - target).square().mean()
    torch.testing.assert_close(result, terms["crop_zoom"])
    return result


def test_the_kernel_weighs_patches_by_their_distance(recipe):
    found = {kind: recipe(gtv_coarse=kind, crop_zoom=False).student("cpu") for kind in ("threshold", "kernel")}
    views = views_of(found["kernel"])
    terms = {kind: student(*views) for kind, student in found.items()}
    assert terms["kernel"]["ncut"] == terms["threshold"]["ncut"]
    student = found["kernel"]
    features = student.features(views[0])
    coarse = student.head(features, views[0])[0].sigmoid()
    assert terms["kernel"]["gtv_coarse"] == losses.gtv_kernel(coarse, features)
    assert terms["kernel"]["gtv_coarse"] != terms["threshold"]["gtv_coarse"]


# What follows from the seed


def test_first_weights_follow_from_the_seed_alone(recipe):
    torch.manual_seed(1)
    first = recipe().student("cpu").state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = recipe().student("cpu").state_dict(), recipe(seed=1).student("cpu").state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.project.weight"], other["head.project.weight"])


def test_steps_are_the_same_again_to_the_last_bit(recipe):
    ends = []
    for _ in range(2):
        student = recipe().student("cpu")
        optimizer = student.optimizer(1e-3)
        for epoch in range(2):
            stepped(student(*views_of(student, epoch=epoch)), optimizer)
        ends.append(student.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# Views


def test_views_without_chance_are_crops_and_their_enlarged_windows(recipe):
    student = recipe(jitter=0, grey=0, flip=1).student("cpu")
    samples = [student.recipe.prepare({}, image) for image in photographs(3)]
    draws = [student.recipe.draw(data.generator(0, 0, i), sample) for i, sample in enumerate(samples)]
    images, zoomed, windows = student.views(samples, draws)
    for i, (sample, draw) in enumerate(zip(samples, draws, strict=True)):
        top, left = draw.corner
        crop = sample["image"][top : top + SIDE, left : left + SIDE][:, ::-1]
        torch.testing.assert_close(images[i], pixels(crop[None])[0], atol=1e-5, rtol=0)
        top, left = draw.zoom
        half = images[i : i + 1, :, top : top + SIDE // 2, left : left + SIDE // 2]
        large = torch.nn.functional.interpolate(half, size=(SIDE, SIDE), mode="bilinear")
        torch.testing.assert_close(zoomed[i], large[0])
    assert windows.tolist() == [list(draw.zoom) for draw in draws]
    assert len(recipe(crop_zoom=False).student("cpu").views(samples, draws)) == 1


def test_crops_and_windows_reach_every_place(recipe):
    sample = recipe().prepare({}, np.zeros((150, 210, 3), np.uint8))
    assert sample["image"].shape == (70, 98, 3)
    draws = [recipe().draw(data.generator(0, 0, i), sample) for i in range(2000)]
    for values, last in (
        ([each.corner[0] for each in draws], 6), ([each.corner[1] for each in draws], 34),
        ([each.zoom[0] for each in draws], 32), ([each.zoom[1] for each in draws], 32),
    ):  # fmt: skip
        counts = np.bincount(values, minlength=last + 1)
        assert len(counts) == last + 1 and counts.min() > 0.4 * 2000 / (last + 1)
    for name, share in (("is_grey", 0.2), ("is_flipped", 0.5)):
        assert np.mean([getattr(each, name) for each in draws]) == pytest.approx(share, abs=0.04)


def test_the_published_windows_hardly_move(recipe):
    published = recipe(image_size=320, resize=335, crop_window="reference")
    sample = {"image": np.zeros((335, 400, 3), np.uint8)}
    windows = [published.draw(data.generator(0, 0, i), sample).zoom for i in range(500)]
    assert {top for top, _ in windows} == {80} and {left for _, left in windows} == set(range(10, 30))


def test_long_and_tiny_images_are_prepared_whole_enough(recipe):
    assert recipe().prepare({}, np.zeros((3, 2, 3), np.uint8))["image"].shape == (105, 70, 3)
    wide = np.zeros((20, 1000, 3), np.uint8)
    wide[:, 460:540] = 255  # the middle
    image = recipe().prepare({}, wide)["image"]
    assert image.shape == (70, 280, 3) and image[:, 10:-10].min() == 255


# What is exported


def exported(student, folder) -> dict:
    student.export(Folder(str(folder)))
    return json.loads((folder / "config.json").read_text())


def test_masks_are_those_that_label_makes_of_the_exported_folder(recipe, tmp_path):
    student = recipe().student("cpu")
    optimizer = student.optimizer(1e-2)
    for epoch in range(3):
        stepped(student(*views_of(student, epoch=epoch)), optimizer)
    before = copy.deepcopy(student.state_dict())
    images = photographs(4)
    student.finish([student.recipe.prepare({}, image) for image in images])
    found = student.predict(images)
    assert student.head.training and all(
        torch.equal(value, before[name]) for name, value in student.state_dict().items()
    )
    config = exported(student, tmp_path / "head")
    assert config["polarity"] == student.sign and config["training"]["tau"] == 0.4 and config["feature"] == "key"
    method = segmenters.find("sempart")(weights=str(tmp_path / "head"), image_size=SIDE, filter="none")
    method.load("cpu")
    for mask, image, segments in zip(found, images, method.segment(images), strict=True):
        assert mask.shape == image.shape[:2] and mask.dtype == np.float32
        np.testing.assert_allclose(mask, segments.masks[0], atol=1e-5)
    head, _ = network.read(tmp_path / "head", method="sempart")
    assert torch.equal(head.fine.weight, student.head.fine.weight)


@pytest.mark.parametrize("bias", [3, -3])
def test_a_head_that_marks_nearly_everything_gets_the_other_sign(bias, recipe, tmp_path):
    student = recipe().student("cpu")
    with torch.no_grad():
        student.head.fine.bias.fill_(bias)
    assert "polarity" not in exported(student, tmp_path / "before")
    student.finish([student.recipe.prepare({}, image) for image in photographs(3)])
    assert exported(student, tmp_path / "after")["polarity"] == (-1 if bias > 0 else 1)
    assert all(mask.mean() < 0.5 for mask in student.predict(photographs(2)))


def test_precise_averages_are_the_mean_over_one_view_of_each_sample(recipe):
    student = recipe(precise_bn=True).student("cpu")
    samples = [student.recipe.prepare({}, image) for image in photographs(4)]
    draws = [student.recipe.draw(data.generator(0, 30, i), each) for i, each in enumerate(samples)]
    statistics = []
    for some in (slice(0, 2), slice(2, 4)):
        head, images = copy.deepcopy(student.head), student.views(samples[some], draws[some])[0]
        for each in head.modules():
            if isinstance(each, torch.nn.BatchNorm2d):
                each.momentum = 1.0
        head(student.features(images), images)
        statistics.append(dict(head.named_buffers()))
    student.finish(samples)
    for name, buffer in student.head.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffer, (statistics[0][name] + statistics[1][name]) / 2)


def test_probabilities_of_a_batch_leave_the_averages_alone(recipe):
    student = recipe().student("cpu")
    images = views_of(student, 3)[0]
    before = copy.deepcopy(student.state_dict())
    found = {mode: student.probabilities(images, batch_statistics=mode) for mode in (True, False)}
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.head.training and found[True].shape == (3, SIDE, SIDE)
    for mode in (True, False):
        with torch.no_grad():
            expected = copy.deepcopy(student.head).train(mode)(student.features(images), images)[1].sigmoid()[:, 0]
        torch.testing.assert_close(found[mode], expected)
    assert not torch.allclose(found[True], found[False], atol=1e-3)


def test_a_head_that_is_there_is_exported_as_it_was(recipe, backbone, tmp_path):
    start = write_head(tmp_path / "start", polarity=-1, backbone=backbone)
    student = recipe(hidden=64, start_from=str(start), epochs=0).student("cpu")
    student.finish([student.recipe.prepare({}, image) for image in photographs(2)])
    assert exported(student, tmp_path / "again")["polarity"] == -1
    assert (tmp_path / "again/head.safetensors").read_bytes() == (start / "head.safetensors").read_bytes()


@pytest.mark.parametrize("feature", ["query", "value", "token"])
def test_other_features_are_those_of_the_backbone_and_said_in_the_folder(feature, recipe, tmp_path):
    student = recipe(feature=feature).student("cpu")
    images = views_of(student)[0]
    expected, _ = student.dino.forward(images, facet=feature)
    assert torch.equal(student.features(images).flatten(2).mT, expected)
    assert exported(student, tmp_path)["feature"] == feature
    with pytest.raises(ValueError, match=f"feature '{feature}'; pass --feature {feature}"):
        recipe(hidden=64, start_from=str(tmp_path)).student("cpu")


@pytest.mark.parametrize("patch", [4, 16])
def test_the_backbones_patch_decides_the_blocks_of_the_decoder(patch, recipe, tmp_path):
    other = write_model(tmp_path / "other", patch_size=patch)
    student = recipe(backbone=str(other)).student("cpu")
    assert len(student.head.up) == {4: 2, 16: 4}[patch]
    terms = student(*views_of(student))
    terms["total"].backward()
    assert all(torch.isfinite(term) for term in terms.values())


# Mistakes

MISTAKES = {
    "tau must be above 0 and below 1": {"tau": 1.0},
    "tau must be above 0 and below 1, as cosines are, got nan": {"tau": float("nan")},
    "tau must be above 0 and below 1, as cosines are, got 0": {"tau": 0},
    "eps must be above 0 and below 0.5": {"eps": 0},
    "sigma must be a finite number above 0": {"sigma": 0},
    "resize must be at least image_size, 64, got 63": {"resize": 63},
    "w_ncut must be a finite number of at least 0": {"w_ncut": -1},
    "w_ncut must be above 0 where": {"w_ncut": 0, "w_gtv_fine": 0, "w_gtv_coarse": 0, "w_consistency": 0},
    "jitter must be a probability": {"jitter": 1.5},
    "flip must be a probability": {"flip": float("nan")},
    "unknown gtv_coarse 'kernal'; did you mean 'kernel'": {"gtv_coarse": "kernal"},
    "unknown crop_window 'middle'": {"crop_window": "middle"},
    "unknown feature 'keys'; did you mean 'key'": {"feature": "keys"},
    "unknown dtype": {"dtype": "float16"},
    "betas must be two numbers": {"betas": (0.9,)},
    "crop_window reference is known for image_size 320 alone, got 64": {"crop_window": "reference"},
    "w_crop_zoom has no effect without crop_zoom": {"crop_zoom": False, "w_crop_zoom": 0.1},
    "gf_radius has no effect without crop_zoom": {"crop_zoom": False, "gf_radius": 3},
    "crop_zoom has no effect where .* pass --no-crop-zoom": {"w_crop_zoom": 0, "w_ncut_crop": 0},
    "hidden has no effect with start_from": {"start_from": "somewhere"},
    "epochs 0 trains nothing": {"epochs": 0},
    "precise_bn has no effect": {"epochs": 0, "hidden": 64, "start_from": "somewhere", "precise_bn": True},
    "backbone must be a folder": {"backbone": ""},
}


@pytest.mark.parametrize(("message", "options"), MISTAKES.items(), ids=MISTAKES)
def test_a_wrong_option_is_refused_in_words(message, options, recipe):
    with pytest.raises(ValueError, match=f"^sempart: {message}"):
        recipe(**options)


def test_what_does_not_fit_the_backbone_is_said_before_anything_starts(recipe, tmp_path):
    rows = [{"key": "a", "uri": "a.jpg"}]
    with pytest.raises(ValueError, match="image_size must be a multiple of the 8 px .* got 60; 56 is one"):
        recipe(image_size=60).rows(rows)
    with pytest.raises(ValueError, match="at least two of them, got 8; 16 is one"):
        recipe(image_size=8).rows(rows)
    with pytest.raises(ValueError, match="--input is needed"):
        recipe().rows(None)
    assert recipe().rows(rows) is rows
    other = write_model(tmp_path / "other", hidden_size=64)
    head = str(write_head(tmp_path / "head"))
    with pytest.raises(ValueError, match="start_from is a head for 32 channels, the backbone has 64"):
        recipe(backbone=str(other), hidden=64, start_from=head).rows(rows)
    foreign = str(write_head(tmp_path / "foreign", backbone="the other one", backbone_digest="0" * 64))
    with pytest.raises(ValueError, match="start_from was trained on 'the other one'"):
        recipe(hidden=64, start_from=foreign).rows(rows)
    absent = recipe(backbone="/no/such")
    assert absent.rows(rows) is rows  # workers may have it; where they run here, they say so
