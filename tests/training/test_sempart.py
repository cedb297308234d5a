"""Sempart's training: stored steps, against the plain loop, what gradients reach, what is exported."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from support.golden import arrays
from support.sempart import SIDE, photographs, pixels, samples_of, small, views_of
from support.tiny.dino import write_model
from support.tiny.sempart import write_head

from raypipe import segmenters
from raypipe.benchmark.plain.train_sempart import PlainLoop, stepped
from raypipe.segmenters.sempart import losses, network
from raypipe.storage import Folder
from raypipe.training import data
from raypipe.training.sempart import Sempart

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recipe(backbone):
    """Small trainings: options -> recipe."""
    return partial(small, backbone)


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
    student.finish(samples_of(student.recipe, 4))
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
    student.finish(samples_of(student.recipe, 3))
    assert exported(student, tmp_path / "after")["polarity"] == (-1 if bias > 0 else 1)
    assert all(mask.mean() < 0.5 for mask in student.predict(photographs(2)))


@pytest.mark.parametrize("epochs", [30, 0])
def test_precise_averages_are_the_mean_over_two_views_of_each_sample(epochs, recipe, backbone, tmp_path):
    start = write_head(tmp_path / "start", polarity=-1, backbone=backbone)
    student = recipe(precise_bn=True, hidden=64, start_from=str(start), epochs=epochs).student("cpu")
    with torch.no_grad():
        student.head.fine.bias.fill_(-3)  # so that few pixels are set, whatever its config.json says
    samples = samples_of(student.recipe, 4)
    statistics = []
    for epoch, some in ((epochs, (0, 1)), (epochs, (2, 3)), (epochs + 1, (0, 1)), (epochs + 1, (2, 3))):
        draws = [student.recipe.draw(data.generator(0, epoch, i), samples[i]) for i in some]
        head, images = copy.deepcopy(student.head), student.views([samples[i] for i in some], draws)[0]
        for each in head.modules():
            if isinstance(each, torch.nn.BatchNorm2d):
                each.momentum = 1.0
        head(student.features(images), images)
        statistics.append(dict(head.named_buffers()))
    student.finish(samples)
    for name, buffer in student.head.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffer, torch.stack([each[name] for each in statistics]).mean(0))
    assert student.sign == 1


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
    student.finish(samples_of(student.recipe, 2))
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
