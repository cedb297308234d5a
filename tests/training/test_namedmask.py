"""NamedMask's training: samples and steps against stored arrays and plain loops, whole trainings, what goes wrong."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from support.archives import make
from support.golden import arrays
from support.namedmask import ATTEMPT, small, work_beside, work_of, write_backbone, write_masks, write_pool
from torch import multiprocessing
from torch.nn import functional as F

import raypipe
from raypipe import networks
from raypipe.benchmark.plain.train_namedmask import plain_batch
from raypipe.report.report import Report, report
from raypipe.segmenters.namedmask import network
from raypipe.storage import Folder, hold
from raypipe.training import augment, data, loop, record
from raypipe.training.augment import Jitter
from raypipe.training.job import Train, default_settings, frozen_settings
from raypipe.training.namedmask import views
from raypipe.training.namedmask.student import counted
from raypipe.training.namedmask.views import IGNORED, Draw, Place, Square
from raypipe.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> dict[str, str]:
    return write_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def straight(pool, tmp_path_factory) -> Folder:
    """A training on one worker that nothing disturbs."""
    folder = Folder(str(tmp_path_factory.mktemp("straight")))
    with hold(folder, ATTEMPT):
        assert loop.run(work_of(small(pool), str(folder)), loop.Place())
    return folder


def batch_of(student, samples, count: int) -> tuple[torch.Tensor, ...]:
    chosen = [student.recipe.choose(data.generator(0, 0, n), samples, n) for n in range(count)]
    return student.views(*map(list, zip(*chosen, strict=True)))


def losses_of(folder: Folder) -> np.ndarray:
    return record.read(folder)["total"].to_numpy()


# Samples


@pytest.mark.parametrize("case", ["pad", "crop"])
def test_a_square_is_the_stored_one(case, shared):
    stored = arrays(shared / f"golden/namedmask/geometric_{case}.npz")
    height, width = stored["scaled_mask"].shape
    left, top, _, _ = stored["padding"]
    offset, side = tuple(stored["offset"].tolist()), int(stored["crop_size"])
    draw = Draw(height, width, (bool(top), bool(left)), offset, bool(stored["flip"]), None, False, None)
    image, labels = views.placed(stored["image"], stored["mask"].astype(np.int16), draw, side)
    assert np.array_equal(np.where(labels == IGNORED, 255, labels), stored["out_mask"])
    assert abs(image.astype(int) - stored["out_image"]).max() <= 1


@pytest.mark.parametrize("case", ["jitter_blur", "gray"])
def test_colours_are_the_stored_ones(case, shared):
    stored = arrays(shared / f"golden/namedmask/photometric_{case}.npz")
    jitter = Jitter(*(float(stored[name]) for name in ("brightness", "contrast", "saturation", "hue")), stored["order"])
    sigma = float(stored["sigma"]) or None
    assert augment.kernel_size(min(stored["image"].shape[:2])) == stored["kernel"]
    draw = Draw(0, 0, (False, False), (0, 0), False, jitter, bool(stored["gray"]), sigma)
    found = views.coloured([Square(stored["image"], np.zeros(0), draw)], "cpu")[0]
    mean, std = (torch.tensor(each)[:, None, None] for each in (networks.IMAGENET_MEAN, networks.IMAGENET_STD))
    levels = ((found * std + mean) * 255).permute(1, 2, 0).numpy()
    assert np.mean(abs(levels - stored["out"]) <= 2) >= 0.99
    assert np.mean(abs(found.numpy() - stored["normalised"]) <= 2 / 255 / 0.224 + 2e-3) >= 0.99


def places_of(masks: np.ndarray, offsets: np.ndarray, lost: int) -> list:
    """Of stored masks, 255 for what is ignored."""
    found = []
    for mask, (top, left) in zip(masks[1:], offsets.tolist(), strict=True):
        rows, columns = (((mask > 0) & (mask < 255)).any(axis).nonzero()[0] for axis in (1, 0))
        if top < 0:
            found.append(None)
            continue
        sides = (int(each[-1] - each[0]) + 1 - lost for each in (rows, columns))
        found.append(Place(int(rows[0]), int(columns[0]), *sides, top, left))
    return found


@pytest.mark.parametrize("case", ["2", "5", "full"])
@pytest.mark.parametrize(("name", "lost"), [("out", 0), ("ref_out", 1)])
def test_objects_are_pasted_as_stored(case, name, lost, shared):
    stored = arrays(shared / f"golden/namedmask/copy_paste_{case}.npz")
    masks = np.where(stored["masks"] == 255, IGNORED, stored["masks"].astype(np.int16))
    images, labels = torch.from_numpy(stored["images"].copy()), torch.from_numpy(masks)
    views.paste_(images, labels, places_of(stored["masks"], stored["offsets"], lost))
    assert np.array_equal(images[0].numpy(), stored[f"{name}_image"])
    assert np.array_equal(np.where(labels[0] == IGNORED, 255, labels[0]), stored[f"{name}_mask"])


def test_places_are_uniform_and_an_object_lies_in_its_square_whole(rng):
    labels = np.full((8, 8), IGNORED, np.int16)
    labels[2:8], labels[3:5, 2:7] = 0, 4
    labels[4, 2] = 0
    found = [views.places(rng, [Square(None, labels, None)], "inclusive")[0] for _ in range(2000)]
    assert {each[:4] for each in found} == {(3, 2, 2, 5)}
    corners = [(each.new_top, each.new_left) for each in found]
    assert set(corners) == {(top, left) for top in range(7) for left in range(4)}
    counts = np.unique(corners, axis=0, return_counts=True)[1]
    assert ((counts - 2000 / 28) ** 2 / (2000 / 28)).sum() < 55  # chi-square, 27 degrees of freedom: 0.1 % are above
    cut = views.places(rng, [Square(None, labels, None)], "reference")[0]
    assert cut[:4] == (3, 2, 1, 4)
    assert views.places(rng, [Square(None, np.minimum(labels, 0), None)], "inclusive") == [None]


@pytest.mark.parametrize("padding", ["uniform", "reference"])
def test_small_images_lie_in_every_corner_as_often_as_asked_for(padding, pool, rng):
    recipe = small(pool, padding=padding, max_scale=0.5)
    corners = [views.draw(rng, recipe, (20, 20)).corner for _ in range(4000)]
    shares = [corners.count(each) / 4000 for each in [(True, True), (False, True), (True, False), (False, False)]]
    expected = [0.25] * 4 if padding == "uniform" else [0.25, 0.75 * 0.25, 0.75**2 * 0.25, 0.75**3]
    np.testing.assert_allclose(shares, expected, atol=0.03)


@pytest.mark.parametrize("size", [(70, 20), (20, 70), (12, 15), (90, 80)])
def test_squares_are_those_of_torchvision_on_pillows_images(size, pool, rng):
    recipe = small(pool, **PLAIN | {"flip": 0.5})
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size[::-1]))
    mask = rng.random(size) > 0.5
    sample = {"image": image, "mask": np.packbits(mask), "label": np.int16(7)}
    for _ in range(20):
        draw = views.draw(rng, recipe, size)
        found = views.square(sample, draw, recipe.crop)
        scaled = TF.resize(Image.fromarray(image), draw[:2], TF.InterpolationMode.BILINEAR)
        its = TF.resize(torch.from_numpy(mask[None].astype(np.uint8) * 7), draw[:2], TF.InterpolationMode.NEAREST)
        wide, high = (max(0, recipe.crop - side) for side in scaled.size)
        left, top = wide * draw.corner[1], high * draw.corner[0]
        padding = [left, top, wide - left, high - top]
        fill = tuple(np.asarray(scaled).mean((0, 1)).astype(np.uint8).tolist())
        window = TF.crop(TF.pad(scaled, padding, fill), *draw.offset, recipe.crop, recipe.crop)
        its = TF.crop(TF.pad(its, padding, 255), *draw.offset, recipe.crop, recipe.crop)
        window, its = (TF.hflip(each) if draw.is_flipped else each for each in (window, its))
        assert np.array_equal(found.image, window)
        assert np.array_equal(found.labels, np.where(its[0] == 255, IGNORED, its[0].short()))


def test_a_sample_follows_from_its_number_alone_and_images_come_again(pool):
    recipe = small(pool, n_max=3)
    samples = work_of(recipe, "out").samples
    numbers = range(300)
    found = [recipe.choose(data.generator(0, 0, number), samples, number) for number in numbers]
    counts = np.bincount([len(squares) for squares, _ in found])
    assert counts[0] == 0 and len(counts) == 4 and counts[1:].min() > 75
    assert len({placing.seed for _, placing in found}) == 300
    again = recipe.choose(data.generator(0, 0, 77), samples, 77)
    for one, other in zip(found[77][0], again[0], strict=True):
        assert np.array_equal(one.image, other.image) and np.array_equal(one.labels, other.labels)
    assert found[77][1] == again[1] and found[77][0][0].draw == again[0][0].draw
    labels = {label for squares, _ in found for each in squares for label in np.unique(each.labels)}
    assert labels == {IGNORED, 0, 1, 2}


def test_samples_are_those_of_torchvision_one_by_one(pool):
    recipe = small(pool, n_max=3, crop=40)
    student, samples = recipe.student("cpu"), work_of(recipe, "out").samples
    images, labels, seeds = batch_of(student, samples, 24)
    plain, its, seeds_ = plain_batch(recipe, samples, range(24))
    assert seeds.tolist() == seeds_ and np.array_equal(labels.where(labels >= 0, 255), its)
    apart = (images - plain).abs() * torch.tensor(networks.IMAGENET_STD)[:, None, None] * 255
    assert (apart <= 2).double().mean() > 0.99 and apart.max() < 16


def test_images_that_wait_as_files_are_the_same_ones_in_less_memory(pool):
    kept, recipe = (frozen_settings(Train(output="out"), small(pool, keep_files=is_file)) for is_file in (True, False))
    assert kept == recipe == default_settings(small(pool)) | recipe  # a training that ran out of memory goes on so
    kept, recipe = (work_of(small(pool, keep_files=is_file), "out") for is_file in (True, False))
    assert kept.samples.digest == recipe.samples.digest and "image" not in kept.samples._samples[0]
    for one, other in zip(kept.samples, recipe.samples, strict=True):
        assert np.array_equal(one["image"], other["image"]) and np.array_equal(one["mask"], other["mask"])


def test_without_copy_paste_a_sample_is_one_image(pool):
    recipe = small(pool, n_max=1)
    samples = work_of(recipe, "out").samples
    assert all(len(recipe.choose(data.generator(0, 0, n), samples, n)[0]) == 1 for n in range(20))


def test_the_rates_are_the_stored_ones(pool, shared):
    stored, recipe = arrays(shared / "golden/namedmask/poly_schedule.npz"), small(pool)
    for part, first in (("classifier", 5e-4), ("backbone", 5e-5)):
        rates = [max(first * recipe.rate(step, 20_000), recipe.least_lr) for step in stored["iteration"].tolist()]
        np.testing.assert_allclose(rates, stored[f"lr_{part}"], rtol=1e-12, atol=0)


# Steps


def seeded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the rule of the stored arrays."""
    made = {}
    for name, value in state.items():
        z = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(value.shape)
        z = torch.from_numpy(np.asarray(z, np.float32))
        if name.endswith("num_batches_tracked"):
            made[name] = torch.zeros_like(value)
        elif name.endswith("running_var"):
            made[name] = 0.5 + z.abs()
        elif value.ndim == 1:
            made[name] = 1 + 0.2 * z if name.endswith("weight") else 0.1 * z
        else:
            made[name] = z * (1 / value[0].numel()) ** 0.5
    return made


def test_four_steps_are_the_stored_ones(pool, shared):
    stored = arrays(shared / "golden/namedmask/train_steps.npz")
    recipe = small(pool, classes="disc, square, other", channels=256, backbone="random", dtype="float32")
    student = recipe.student("cpu")
    student.network.load_state_dict(seeded(student.network.state_dict()))
    student.dropped.p = 0.0
    optimizer = student.optimizer(recipe.lr)
    labels = torch.from_numpy(stored["y"]).long()
    labels[labels == 255] = IGNORED
    first = [group["lr"] for group in optimizer.param_groups]
    for step, tolerance in enumerate((1e-4, 5e-3, 3e-2, 3e-2)):
        for group, lr in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = max(lr * recipe.rate(step, 10), recipe.least_lr)
        np.testing.assert_allclose([group["lr"] for group in optimizer.param_groups], stored["lrs"][step], rtol=1e-12)
        optimizer.zero_grad()
        loss = student(torch.from_numpy(stored["x"]), labels, torch.zeros(4))["total"]
        loss.backward()
        assert loss.item() == pytest.approx(stored["losses"][step], abs=tolerance)
        if step == 0:
            norm = torch.nn.utils.get_total_norm([each.grad for each in student.parameters()])
            assert norm.item() == pytest.approx(stored["grad_norms"][0], rel=0.01)
        optimizer.step()
    state = student.network.state_dict()
    after = {name.removeprefix("after/"): each for name, each in stored.items() if name.startswith("after/")}
    assert len(after) == 6
    for name, expected in after.items():
        np.testing.assert_allclose(state[name], expected, atol=5e-3, err_msg=name)


def test_the_loss_is_the_mean_over_pixels_that_count(pool):
    student = small(pool).student("cpu")
    images, labels, seeds = batch_of(student, work_of(student.recipe, "out").samples, 4)
    assert (labels == IGNORED).any() and labels.max() == 2
    state = {name: each.clone() for name, each in student.state_dict().items()}
    found = student(images, labels, seeds)
    student.load_state_dict(state)
    student.dropped.seeds = seeds.tolist()
    logits = student.network(images)
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED)
    assert found["total"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_measures_are_those_of_a_plain_loop_over_a_hundred_steps(pool, rng):
    student = small(pool).student("cpu")
    right, found, true = np.zeros((3, 3), int)
    for step in range(200):
        guess, labels = rng.integers(0, 3, (2, 2, 4, 4))
        labels[rng.random(labels.shape) < 0.2] = IGNORED
        logits = F.one_hot(torch.from_numpy(guess), 3).permute(0, 3, 1, 2).float()
        told = {name: each.item() for name, each in student.measures(counted(logits, torch.from_numpy(labels))).items()}
        if step >= 100:
            for one, other in zip(guess.ravel(), labels.ravel(), strict=True):
                if other != IGNORED:
                    found[one] += 1
                    true[other] += 1
                    right[other] += one == other
        if step % 100 != 99:
            assert np.isnan(told["miou"]) and np.isnan(told["accuracy"])
    assert told["miou"] == pytest.approx((right / (found + true - right)).mean(), rel=1e-6)
    assert told["accuracy"] == pytest.approx(right.sum() / true.sum(), rel=1e-6)


def test_what_is_dropped_of_a_sample_follows_from_its_seed_in_any_batch(pool):
    dropped = small(pool).student("cpu").dropped
    x = torch.ones(3, 16, 8, 8)
    dropped.seeds = [5, 6, 7]
    whole = dropped(x)
    dropped.seeds = [6]
    assert torch.equal(dropped(x[:1])[0], whole[1]) and not torch.equal(whole[0], whole[1])
    assert whole.unique().tolist() == pytest.approx([0.0, 1 / 0.9]) and abs((whole == 0).float().mean() - 0.1) < 0.02
    dropped.eval()
    assert torch.equal(dropped(x), x)


def test_a_batch_in_which_no_pixel_counts_is_skipped_and_counted(pool, tmp_path, monkeypatch):
    folder = Folder(str(tmp_path / "out"))
    placed, number = views.placed, iter(range(1000))

    def of_nothing(*given):
        image, labels = placed(*given)
        return image, np.full_like(labels, IGNORED) if 4 <= next(number) < 8 else labels

    monkeypatch.setattr(views, "placed", of_nothing)
    monkeypatch.setattr(loop, "map_ahead", lambda function, arguments, depth: map(function, arguments))
    with hold(folder, ATTEMPT):
        assert loop.run(work_of(small(pool, n_max=1, iterations=3), str(folder)), loop.Place())
    rows = record.read(folder).to_pylist()
    assert [row["skipped"] for row in rows] == [False, True, False] and np.isnan(rows[1]["total"])
    assert np.isfinite(rows[2]["total"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_samples_and_the_loss_of_the_cpu(pool):
    found = []
    for device in ("cpu", "cuda"):
        student = small(pool, n_max=3, dtype="float32").student(device)
        images, labels, seeds = batch_of(student, work_of(student.recipe, "out").samples, 12)
        student.dropped.p = 0.0  # each device draws its own
        loss = student(images, labels, seeds)["total"]
        loss.backward()
        norm = torch.nn.utils.get_total_norm([each.grad for each in student.parameters()])
        found.append([each.detach().cpu() for each in (images, labels, loss, norm)])
    (images, labels, loss, norm), (images_, labels_, loss_, norm_) = found
    assert torch.equal(labels, labels_) and (abs(images - images_) * 255 * 0.224 <= 2).double().mean() > 0.99
    torch.testing.assert_close(loss_, loss, rtol=0.02, atol=0)
    torch.testing.assert_close(norm_, norm, rtol=0.1, atol=0)


# Whole trainings


def test_two_workers_find_the_losses_of_one(pool, straight, tmp_path):
    folder = Folder(str(tmp_path / "two"))
    with hold(folder, ATTEMPT):
        multiprocessing.spawn(work_beside, (small(pool), str(folder), 2), nprocs=2)
    found, expected = losses_of(folder), losses_of(straight)
    assert len(expected) == 6
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[:3], expected[:3], atol=1e-3)


def test_six_steps_straight_are_three_a_stop_and_three_more(pool, straight, tmp_path):
    folder, asked = Folder(str(tmp_path / "out")), iter([False, False, True])
    torch.manual_seed(11)  # of no effect
    with hold(folder, ATTEMPT):
        assert not loop.run(work_of(small(pool), str(folder)), loop.Place(is_stopped=lambda: next(asked)))
        assert loop.run(work_of(small(pool), str(folder)), loop.Place())
    assert folder.read("model.safetensors") == straight.read("model.safetensors")
    assert np.array_equal(losses_of(folder), losses_of(straight))


def test_an_exported_network_is_that_of_the_student(pool, straight):
    made, config = network.read(Path(straight.path()), method="namedmask")
    assert config["classes"] == ["disc", "square"] and config["queries"] == ["disc", "square"]
    assert made.classes == 3 and config["training"]["iterations"] == 6
    student = small(pool).student("cpu")
    before = {name: each.clone() for name, each in student.state_dict().items()}
    student.network.load_state_dict(made.state_dict())
    image = np.full((40, 50, 3), 90, np.uint8)
    (mask,) = student.predict([image])
    assert mask.shape == (40, 50) and mask.dtype == np.float32 and 0 <= mask.min() <= mask.max() <= 1
    assert student.training and before.keys() == student.state_dict().keys()


@pytest.mark.slow
def test_animals_are_learned_from_their_photographs_masks_and_names(shared, tmp_path):
    folder = shared / "data/gloper_examples"
    photos = sorted((folder / "images").iterdir())
    masks = {file: np.asarray(Image.open(folder / f"foreground_grabcut/{file.stem}.png")) > 0 for file in photos}
    names = dict.fromkeys(file.stem.rpartition("_")[0] for file in photos)
    archive = make(tmp_path / "archive", {name: [f for f in photos if f.stem.startswith(name)] for name in names})
    write_masks(str(archive), str(tmp_path / "run"), masks)
    pool = {"archive": str(archive), "masks": str(tmp_path / "run"), "backbone": write_backbone(tmp_path / "net.pth")}
    options = {"crop": 64, "iterations": 150, "channels": 64, "min_scale": 0.1, "max_scale": 0.2, "experts": False}
    options |= {"lr": 5e-3, "backbone_factor": 1.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0, "n_max": 1}
    done = train(Train(output=str(tmp_path / "out"), local=True), small(pool, **options))
    losses = losses_of(Folder(done.output))
    assert len(losses) == done.steps == 150 and losses[-20:].mean() < 0.7 * losses[:20].mean()
    (tmp_path / "two").mkdir()
    for file in photos[:2]:
        Image.open(file).resize((160, 120)).convert("RGB").save(tmp_path / "two" / f"{file.stem}.png")
    raypipe.label("namedmask", str(tmp_path / "two"), str(tmp_path / "labels"), weights=done.output, local=True)
    rows = raypipe.load(str(tmp_path / "labels")).to_pylist()
    assert [row["error"] for row in rows] == ["", ""]
    assert {each["label"] for row in rows for each in row["segments"]} <= set(names)
    report(Report(runs=(str(tmp_path / "labels"),)))
    assert (tmp_path / "labels/report.html").is_file()
