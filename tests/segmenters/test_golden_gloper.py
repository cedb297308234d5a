"""GloPER against stored arrays of the published code: weights and noise injected, so that no generator matters."""

import numpy as np
import pytest
from support.golden import arrays

torch = pytest.importorskip("torch")

from raypipe.benchmark.plain import gloper as plain_gloper  # noqa: E402
from raypipe.segmenters.gloper import unet as gloper  # noqa: E402
from raypipe.segmenters.gloper.fit import Problems, Settings, margin  # noqa: E402

SIZES = (4, 8)
GENERATOR = [0.23644638061523438, 0.2266179919242859]  # torch.rand(2) of the generator that drew the full seed, seed 41


@pytest.fixture(scope="module", params=["zebra64_tiny", "zebra64_tiny_fg"])
def case(request, shared) -> dict:
    return arrays(shared / "golden" / "gloper" / f"{request.param}.npz")


@pytest.fixture(scope="module")
def full(shared) -> dict:
    if torch.rand(2, generator=torch.Generator().manual_seed(41)).tolist() != GENERATOR:
        pytest.skip("another random generator")
    return arrays(shared / "golden" / "gloper" / "zebra64_full_seed.npz")


def picture(case: dict) -> "torch.Tensor":
    return torch.from_numpy(case["image"]).permute(2, 0, 1)[None].float() / 255


def weights(case: dict) -> dict:
    """The published initial weights, without the biases that normalisation subtracts."""
    stored = {name[5:]: torch.from_numpy(value) for name, value in case.items() if name.startswith("init/")}
    return {name: value for name, value in stored.items() if not (".conv" in name and name.endswith("bias"))}


def optimised(case: dict, monkeypatch, sizes=SIZES, steps: int | None = None):
    """Our optimiser on the case: the problems and their results."""
    monkeypatch.setattr(gloper, "initial_weights", lambda widths, seed: weights(case))
    steps = steps or int(case["steps"])
    widths = tuple(case["widths"].tolist())
    settings = Settings(widths, steps, float(case["lr"]), 0.01, float(case["tau"]), "float32")
    noise = torch.from_numpy(case["noise"])
    foreground = torch.from_numpy(case["foreground"]).float()[None]
    problems = Problems((1, 3, *foreground.shape[1:]), sizes, 1, settings, torch.device("cpu"))
    return problems, problems.fit(picture(case), foreground, [0], noise[:, :, 1] - noise[:, :, 0])


def test_the_first_logits_are_the_published_ones(case):
    networks = gloper.Unets(case["widths"].tolist(), 2)
    networks.load_state_dict(gloper.stack([weights(case)] * 2))
    logits, _, _ = networks(picture(case).repeat(1, 2, 1, 1), SIZES)
    for size, found in zip(SIZES, logits.detach().numpy(), strict=True):
        np.testing.assert_allclose(found, case[f"logits_first_s{size}"], atol=1e-4)


def test_the_first_gradients_are_the_published_ones(case, monkeypatch):
    problems, _ = optimised(case, monkeypatch, steps=1)
    names = [name.partition("/")[2] for name in case if name.startswith("grad0_s4/")]
    assert len(names) == 9
    for name in names:
        found, stored = problems.networks.get_parameter(name).grad, case[f"grad0_s4/{name}"]
        np.testing.assert_allclose(found[: len(stored)], stored, rtol=0, atol=1e-3 * np.abs(stored).max())  # of size 4


@pytest.mark.parametrize("sizes", [(4, 8), (4,), (8,)])
def test_the_optimisation_follows_the_published_one(case, sizes, monkeypatch):
    _, found = optimised(case, monkeypatch, sizes)
    x, rho = picture(case)[0], float(case["rho"])
    atol = 2e-2 if case["tau"] < 0.2 else 5e-3  # hard assignments flip sooner at a low temperature
    for size, fitted in zip(sizes, found, strict=True):
        losses = fitted.losses[:, 0, 0].numpy()
        np.testing.assert_allclose(losses[0], case[f"loss_s{size}"][0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(losses, case[f"loss_s{size}"], rtol=0, atol=2e-3)
        np.testing.assert_allclose(fitted.fine[0, 0], case[f"centroids_fine_s{size}"], rtol=0, atol=atol)
        np.testing.assert_allclose(fitted.coarse[0, 0], case[f"centroids_coarse_s{size}"], rtol=0, atol=atol)
        mask = (margin(x, fitted.fine[0, 0]).sigmoid() > rho).numpy()
        assert (mask != stored_mask(case, size)).mean() < 0.02


@pytest.mark.parametrize("size", SIZES)
def test_the_fur_weight_of_stored_colours_is_the_stored_one(case, size):
    colours, stored = torch.from_numpy(case[f"centroids_fine_s{size}"]), case[f"fur_weight_s{size}"]
    x, rho = picture(case), float(case["rho"])
    for found in (margin(x[0], colours).sigmoid(), plain_gloper.fur_weight(x, colours[None])):
        np.testing.assert_allclose(found, stored, rtol=0, atol=1e-5)
        differs = (found.numpy() > rho) != stored_mask(case, size)
        assert not differs[np.abs(stored - rho) > 1e-5].any()


@pytest.mark.parametrize("size", SIZES)
def test_the_plain_loop_follows_the_published_one(case, size):
    network = plain_gloper.PlainUnet(case["widths"].tolist())
    stored = {name[5:]: torch.from_numpy(value) for name, value in case.items() if name.startswith("init/")}
    assert not network.load_state_dict(stored, strict=False).unexpected_keys
    noise, foreground = torch.from_numpy(case["noise"]), torch.from_numpy(case["foreground"]).float()[None]
    options = {"steps": int(case["steps"]), "tau": float(case["tau"]), "lr": float(case["lr"])}
    weight, (fine, _), losses = plain_gloper.fit(
        network, picture(case), foreground, size, **options, noise=lambda step, _: noise[step]
    )
    np.testing.assert_allclose(losses, case[f"loss_s{size}"], rtol=0, atol=2e-3)
    np.testing.assert_allclose(fine[0], case[f"centroids_fine_s{size}"], rtol=0, atol=2e-2)
    assert ((weight.numpy() > float(case["rho"])) != stored_mask(case, size)).mean() < 0.02


def test_the_seed_draws_the_published_weights(full):
    found = gloper.initial_weights(tuple(full["widths"].tolist()), int(full["seed"]))
    stored = dict(zip(full["weight_names"], full["weight_sums"], strict=True))
    assert set(found) == {name for name in stored if not (".conv" in name and name.endswith("bias"))}
    for name, value in found.items():
        sums = value.double().sum().item(), value.double().abs().sum().item()
        np.testing.assert_allclose(sums, stored[name], rtol=1e-6, atol=1e-6)


def test_the_plain_loop_draws_the_published_noise(full):
    drawn = []

    def noise(step: int, logits):
        drawn.append(plain_gloper.gumbel(logits))
        return drawn[-1]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(full["seed"]))
        network = plain_gloper.PlainUnet(full["widths"].tolist())
        options = {"steps": int(full["steps"]), "tau": 0.1, "lr": 1e-3, "noise": noise}
        _, (fine, _), losses = plain_gloper.fit(network, picture(full), torch.ones(1, 64, 64), 8, **options)
    np.testing.assert_allclose(torch.stack(drawn), full["noise"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(losses, full["loss_s8"], rtol=0, atol=2e-3)
    np.testing.assert_allclose(fine[0], full["centroids_fine_s8"], rtol=0, atol=5e-3)


def stored_mask(case: dict, size: int) -> np.ndarray:
    shape = tuple(case["mask_shape"])
    return np.unpackbits(case[f"mask_s{size}"], count=shape[0] * shape[1]).reshape(shape).astype(bool)
