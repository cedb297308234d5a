"""SelfMask's training: its losses, the masks of a run as targets, and the way from a run to weights that label."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import golden
from support.tiny import dino

import raypipe
from raypipe.benchmark.plain import selfmask as plain
from raypipe.segmenters.selfmask import SelfMask as Method
from raypipe.segmenters.selfmask.losses import dice, losses, ranking
from raypipe.storage import Folder
from raypipe.training import record
from raypipe.training.selfmask import SelfMask
from raypipe.training.train import Train, train

pytestmark = pytest.mark.usefixtures("one_thread")
ORDERS = ["corrected", "reference"]


@pytest.fixture
def predictions():
    """Masks of two images, two blocks, five queries on an oblong grid, what they are sure of, and their targets."""
    random = torch.Generator().manual_seed(3)
    masks = torch.rand(2, 2, 5, 6, 7, generator=random).requires_grad_()
    objectness = torch.rand(2, 2, 5, 1, generator=random).requires_grad_()
    return masks, objectness, torch.rand(2, 25, 28, generator=random) > 0.6


@pytest.mark.parametrize("order", ORDERS)
def test_losses_and_gradients_are_those_of_a_plain_loop(predictions, order):
    masks, objectness, targets = predictions
    found, expected = losses(*predictions, order=order), plain.losses(*predictions, order=order)
    for name in ("dice", "ranking"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=0)
    one, other = (torch.autograd.grad(sum(each.values()), (masks, objectness)) for each in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_losses_and_gradients_are_those_of_the_authors_code():
    stored = golden.arrays(Path(__file__).parents[1] / "golden/selfmask_loss_dice_ranking.npz")
    masks, objectness = (torch.tensor(stored[name], requires_grad=True) for name in ("mask_pred", "objectness"))
    targets = torch.tensor(stored["pseudo_mask"])
    terms = {order: losses(masks, objectness, targets, order=order) for order in ORDERS}
    for order, name in (("reference", "ranking_reference_order"), ("corrected", "ranking_corrected")):
        np.testing.assert_allclose(terms[order]["dice"].item(), stored["dice"], rtol=1e-5)
        np.testing.assert_allclose(terms[order]["ranking"].item(), stored[name], rtol=1e-5)
    gradients = torch.autograd.grad(sum(terms["reference"].values()), (masks, objectness))
    for found, name in zip(gradients, ("grad_mask_pred", "grad_objectness_reference_order"), strict=True):
        np.testing.assert_allclose(found, stored[name], atol=1e-5 * abs(stored[name]).max())


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_those_of_finite_differences(predictions, order):
    masks, objectness = (each[:1, :, :3].detach().double().requires_grad_() for each in predictions[:2])
    terms = partial(losses, targets=predictions[2][:1], order=order)
    assert torch.autograd.gradcheck(lambda *given: tuple(terms(*given).values()), (masks, objectness))


def test_a_perfect_mask_costs_nothing_and_an_empty_one_almost_all():
    target = torch.zeros(1, 8, 8)
    target[0, 2:6, 2:6] = 1
    masks = torch.stack([target[0], torch.zeros(8, 8), 1 - target[0]])[None, None]
    expected = [0, 1 - 1 / 17, 1 - 1 / 65]
    np.testing.assert_allclose(dice(masks, target)[0, 0], expected, atol=1e-6)


def test_the_worse_of_two_queries_is_charged_for_being_surer_and_the_released_code_charges_the_better():
    costs, sure = torch.tensor([[[0.2, 0.7]]]), torch.tensor([[[0.3, 0.8]]])
    assert ranking(costs, sure) == 0.5 and ranking(costs, sure, order="reference") == 0
    assert ranking(costs, sure.flip(2)) == 0 and ranking(costs, sure.flip(2), order="reference") == 0.5


def test_an_image_whose_target_is_lost_costs_nothing(predictions):
    masks, objectness, targets = predictions
    with_one = losses(masks, objectness, torch.stack([targets[0], torch.zeros_like(targets[1])]))
    alone = losses(masks[:1], objectness[:1], targets[:1])
    torch.testing.assert_close({name: 2 * term for name, term in with_one.items()}, alone)


def test_queries_of_equal_masks_are_not_ranked():
    assert ranking(torch.full((1, 1, 4), 0.5), torch.rand(1, 1, 4)) == 0


# The recipe and its student


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return str(dino.write_model(tmp_path_factory.mktemp("dino")))


@pytest.fixture
def recipe(backbone):
    """A SelfMask of random weights, four queries that look twice."""

    def made(**options) -> SelfMask:
        sizes = {"queries": 4, "layers": 2, "inner": 48, "image_size": 32, "batch_size": 2}
        return SelfMask(**{"masks": "run", "backbone": backbone} | sizes | options)

    return made


@pytest.fixture
def noise() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((45, 70), (32, 32))]


def test_the_rate_falls_over_the_whole_training_and_in_the_released_code_anew_in_each_epoch(recipe):
    steps = range(0, 1200, 50)
    np.testing.assert_allclose([recipe().rate(t, 1200) for t in steps], [(1 - t / 1200) ** 0.9 for t in steps])
    released = [recipe(schedule="reference").rate(t, 1200) for t in range(1200)]
    assert released[:100] == released[500:600] and released[0] == 1
    np.testing.assert_allclose(released[99], (1 - 99 / 1200) ** 0.9)


def test_the_first_weights_depend_on_the_seed_alone(recipe):
    torch.manual_seed(5)
    first, state = recipe().student("cpu").state_dict(), torch.get_rng_state()
    again, other = recipe().student("cpu").state_dict(), recipe(seed=1).student("cpu").state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    differ = {name for name in first if not torch.equal(first[name], other[name])}
    assert "network.query_embed" in differ and not any(name.startswith("network.encoder.") for name in differ)


def test_all_of_the_network_is_trained_by_the_weighted_terms(recipe):
    student = recipe(w_dice=0.5, w_ranking=3.0).student("cpu")
    pixels, targets = torch.randn(2, 3, 32, 32), torch.rand(2, 32, 32) > 0.7
    terms = student(pixels, targets)
    expected = losses(*student.network(pixels), targets)
    torch.testing.assert_close({name: terms[name] for name in expected}, expected)
    torch.testing.assert_close(terms["total"], 0.5 * expected["dice"] + 3 * expected["ranking"])
    terms["total"].backward()
    without = [name for name, each in student.named_parameters() if each.grad is None or not each.grad.any()]
    # the first block's queries start at 0, which its self-attention, without biases yet, hands on
    assert all(
        name.startswith(("network.decoder.layers.0.self_attn.", "network.decoder.layers.0.norm1.")) for name in without
    )
    assert all(each.grad is not None for each in student.parameters())


@pytest.mark.parametrize("chance", [0, 1])
def test_views_hold_the_image_and_its_mask_at_one_place(recipe, chance):
    made = recipe(image_size=48, min_scale=0.5, max_scale=0.5, flip=chance, jitter=chance, grey=chance, blur=chance)
    image = np.full((48, 48, 3), (0, 0, 255), np.uint8)
    image[8:40, 4:20] = (255, 0, 0)
    sample = {"image": image, "mask": image[..., 0] > 0}
    drawn = [made.draw(np.random.default_rng(i), sample) for i in range(4)]
    pixels, targets = made.student("cpu").views([sample] * 4, drawn)
    assert pixels.shape == (4, 3, 48, 48) and targets.shape == (4, 48, 48) and targets.dtype == torch.bool
    mask = np.zeros((48, 48), bool)
    mask[4:20, 2:10] = True
    mask = mask[:, ::-1] if chance else mask
    assert all((target.numpy() == mask).all() for target in targets)
    colours = pixels * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    colours += torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    assert colours.min() > -1e-5 and colours.max() < 1 + 1e-5
    inside, below = colours[0, :, 8:16, (40 if chance else 4) : (44 if chance else 8)], colours[0, :, 30:40, 20:30]
    if chance:
        torch.testing.assert_close(inside[0], inside[2])  # grey
    else:
        torch.testing.assert_close(inside, torch.tensor([1.0, 0, 0])[:, None, None].expand_as(inside))
        share = 32 * 16 / 48**2
        torch.testing.assert_close(below, torch.tensor([share, 0, 1 - share])[:, None, None].expand_as(below))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_losses_that_the_cpu_does(recipe):
    rng, made = np.random.default_rng(0), recipe(dtype="float32")
    samples = [{"image": rng.integers(0, 256, (32, 32, 3), np.uint8), "mask": rng.random((32, 32)) > 0.5}] * 4
    drawn = [made.draw(np.random.default_rng(i), sample) for i, sample in enumerate(samples)]
    here, there = (made.student(device) for device in ("cpu", "cuda"))
    expected, found = (student(*student.views(samples, drawn)) for student in (here, there))
    for name, term in expected.items():
        np.testing.assert_allclose(found[name].item(), term.item(), rtol=1e-3, atol=1e-4)


def test_an_exported_network_labels_as_the_student_does_and_can_be_gone_on_from(recipe, noise, tmp_path):
    student = recipe(heads=4).student("cpu")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    masks = student.predict(noise)
    assert student.training and all(torch.equal(before[name], each) for name, each in student.state_dict().items())
    student.export(Folder(str(tmp_path)))
    method = Method(weights=str(tmp_path))
    method.load("cpu")
    for found, mask, image in zip(method.segment(noise), masks, noise, strict=True):
        assert mask.dtype == np.float32 and mask.shape == image.shape[:2] and mask.std() > 0
        np.testing.assert_allclose(found.masks[0], mask, atol=1e-6)
    again = SelfMask(masks="run", start_from=str(tmp_path), image_size=32).student("cpu")
    assert again.training and all(parameter.requires_grad for parameter in again.parameters())
    for found, mask in zip(again.predict(noise), masks, strict=True):
        np.testing.assert_allclose(found, mask, atol=1e-6)


WRONG = {
    "unknown ranking_order 'other'; choose one of: corrected, reference": {"ranking_order": "other"},
    "unknown schedule 'referense'; did you mean 'reference'": {"schedule": "referense"},
    "ranking_order has no effect where w_ranking is 0": {"ranking_order": "reference", "w_ranking": 0},
    "w_dice must be above 0, for nothing else teaches masks, got 0": {"w_dice": 0},
    "queries must be at least 1, got 0": {"queries": 0},
    "w_ranking must be a finite number of at least 0, got nan": {"w_ranking": float("nan")},
    "blur must be a probability in .0, 1., got 1.5": {"blur": 1.5},
    "min_scale must be above 0 and at most max_scale, 0.5, got 0.6": {"min_scale": 0.6, "max_scale": 0.5},
    "queries 4 has no effect with start_from, which is a whole network": {"start_from": "network"},
    "unknown dtype 'half'": {"dtype": "half"},
    "epochs must be at least 1, got 0": {"epochs": 0},
}


@pytest.mark.parametrize("text", WRONG)
def test_options_that_make_no_sense_are_refused(recipe, backbone, text):
    options = {"backbone": SelfMask.backbone} if "start_from" in WRONG[text] else {}
    with pytest.raises(ValueError, match=f"^selfmask: {text}"):
        recipe(**WRONG[text] | options)


@pytest.mark.parametrize("option", ["backbone", "start_from"])
def test_weights_that_are_not_here_are_named_by_their_option(option, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flag = option.replace("_", "-")
    expected = f"`raypipe weights lost --weights org/none --to DIR` where there is internet and pass --{flag} DIR"
    with pytest.raises(FileNotFoundError, match=f"^selfmask: no weights 'org/none' here .*{expected}"):
        SelfMask(masks="run", **{option: "org/none"}).student("cpu")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image_size": 36}, "image_size must be a multiple of 8, the side of the network's patches, got 36"),
        ({"heads": 5}, "32 channels cannot be divided among 5 heads"),
    ],
    ids=["size", "heads"],
)
def test_options_that_do_not_fit_the_backbone_are_refused(recipe, options, text):
    with pytest.raises(ValueError, match=f"^selfmask: {text}"):
        recipe(**options).student("cpu")


# From a run to weights that label


def discs(folder: Path, count: int) -> None:
    """Photographs of a bright disc on a dark ground, both noisy."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:48, :64]
    for i in range(count):
        y, x, colour = rng.integers(16, 32), rng.integers(18, 46), rng.integers(120, 200, 3)
        disc = ((rows - y) ** 2 + (columns - x) ** 2 < 13**2)[..., None]
        image = np.where(disc, colour, colour - 100) + rng.integers(0, 56, (48, 64, 3))
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")


def test_what_one_method_found_teaches_another_which_then_labels_alone(recipe, tmp_path):
    discs(tmp_path / "photos", 12)
    photos, run, weights, taught = (str(tmp_path / name) for name in ("photos", "run", "weights", "taught"))
    raypipe.label("grabcut", photos, run, local=True)
    found = {row["key"]: raypipe.decode(row)[0] for row in raypipe.load(run).to_pylist()}
    shutil.copy(tmp_path / "photos/0.png", tmp_path / "photos/1.png")  # it is another photograph now
    options = {"image_size": 48, "batch_size": 4, "lr": 5e-4, "min_scale": 0.8, "jitter": 0.5, "blur": 0.2}
    job = Train(output=weights, local=True, device="cpu")
    done = train(job, recipe(masks=run, epochs=20, **options))
    assert done.images == 11 and done.steps == 60
    assert list(done.skipped) == ["1.png"] and done.skipped["1.png"].startswith("fetch: changed: ")
    total = record.read(Folder(weights))["total"].to_numpy()
    assert total[-10:].mean() < 0.85 * total[:10].mean()
    exported = (tmp_path / "weights/model.safetensors").read_bytes()
    (tmp_path / "weights/_runs/finished.json").unlink()  # as if it had been killed behind its last checkpoint
    assert train(job, recipe(masks=run, epochs=20, **options)).is_new
    assert (tmp_path / "weights/model.safetensors").read_bytes() == exported
    raypipe.label("selfmask", photos, taught, weights=weights, local=True)
    overlaps = []
    for row in raypipe.load(taught).to_pylist():
        mask, target = raypipe.decode(row)[0], found["0.png" if row["key"] == "1.png" else row["key"]]
        overlaps.append((mask & target).sum() / (mask | target).sum())
    assert np.mean(overlaps) > 0.5
