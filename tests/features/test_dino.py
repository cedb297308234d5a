"""Features of images of any size: order, geometry, precision, and what is refused."""

import logging

import numpy as np
import pytest
import torch
from support.tiny import dino_pca
from support.tiny.dino import write_model

from raypipe.features import dino as module
from raypipe.features import grid
from raypipe.features.dino import Dino
from raypipe.types import BadImage

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [(24, 40), (17, 33), (24, 40), (5, 3), (1, 1), (24, 35), (1, 200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def network(folder):
    return Dino(folder, method="test", device="cpu")


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in SIZES]


@pytest.mark.parametrize("fit", grid.FITS)
def test_images_of_any_size_are_answered_in_order_on_their_grid(fit, network, images):
    expected = {
        "pad": [(3, 5), (3, 5), (3, 5), (1, 1), (1, 1), (3, 5), (1, 25)],
        "crop": [(3, 5), (2, 4), (3, 5), (1, 1), (1, 1), (3, 4), (1, 25)],
        "resize": [(3, 5), (2, 4), (3, 5), (1, 1), (1, 1), (3, 4), (1, 25)],
    }
    expected |= {"reflect": expected["pad"], "free": expected["crop"]}
    found = list(network(images, fit=fit))
    assert [each.grid for each in found] == expected[fit]
    for image, each in zip(images, found, strict=True):
        (alone,) = network([image], fit=fit)
        torch.testing.assert_close(each.patches, alone.patches)
        assert each.patches.shape == (np.prod(each.grid), network.width) and each.patches.dtype == torch.float32
        if fit != "resize":
            assert each.seen == image.shape[:2]


def test_an_image_may_be_a_mirrored_view(network, images):
    view = images[0][:, ::-1]
    (found,), (copied,) = (network([each], fit="pad") for each in (view, view.copy()))
    torch.testing.assert_close(found.patches, copied.patches, rtol=0, atol=0)


def test_a_batch_gives_what_each_image_gives_alone(network):
    images = np.random.default_rng(1).integers(0, 256, (8, 40, 48, 3)).astype(np.uint8)
    pixels = torch.cat([network.pixels(image, (40, 48), "pad") for image in images])
    for facet in module.FACETS:
        together, attention = network.forward(pixels, facet=facet, cls_attention=True)
        for i in range(len(images)):
            alone, row = network.forward(pixels[i : i + 1], facet=facet, cls_attention=True)
            torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(attention[i], row[0], atol=1e-6, rtol=0)


def test_what_is_asked_for_is_what_the_whole_model_computes(network):
    pixels = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    hf = Dino(network.network, method="test", device="cpu", positions="hf")
    whole = network.network(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    states, last = whole.hidden_states, whole.last_hidden_state
    torch.testing.assert_close(hf.tokens(pixels, facet="token_norm")[0], last)
    torch.testing.assert_close(hf.tokens(pixels, facet="token", block=0)[0], states[1])
    given, _ = hf.tokens(pixels, facet="input", block=1)
    torch.testing.assert_close(hf.projection("value", 1)(given), hf.tokens(pixels, facet="value", block=1)[0])
    parts = [hf.tokens(pixels, facet=facet)[0] for facet in ("key", "query", "value")]
    torch.testing.assert_close(hf.tokens(pixels, facet="kqv")[0], torch.cat(parts, 2))


def test_the_last_block_stops_where_its_rest_is_unused(folder):
    network = Dino(folder, method="test", device="cpu")
    calls = []
    for i, block in enumerate(network.network.layers):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
        block.mlp.register_forward_hook(lambda *_, i=i: calls.append(f"mlp {i}"))
    network.forward(torch.zeros(1, 3, 16, 16), facet="key", cls_attention=True)
    assert calls == ["mlp 0", 0, "mlp 1", 1]


def test_attention_runs_fused(network, monkeypatch):
    assert network.network.config._attn_implementation == "sdpa"
    fused, calls = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    network.forward(torch.zeros(1, 3, 16, 16), cls_attention=True)
    assert len(calls) == network.depth - 1


def test_positions_are_resampled_once_per_grid(network, monkeypatch):
    interpolate, calls = torch.nn.functional.interpolate, []
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda *a, **k: calls.append(1) or interpolate(*a, **k))
    for size in (72, 80, 72, 80, 64):  # the last is the grid that the weights have
        network.forward(torch.zeros(1, 3, 64, size))
    assert len(calls) == 2


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75."""
    x, a = abs(x), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("positions", module.POSITIONS)
@pytest.mark.parametrize("cells", [(3, 5), (11, 7), (8, 9)])
def test_positions_are_resampled_by_either_rule(positions, cells, folder):
    network = Dino(folder, method="test", device="cpu", positions=positions)
    stored = network.network.embeddings.position_embeddings[0].double().numpy()
    grid_of_8, expected = stored[1:].reshape(8, 8, -1), np.zeros((*cells, stored.shape[1]))
    offset = 0.1 if positions == "dino" else 0
    for y in range(cells[0]):
        for x in range(cells[1]):
            at = [(c + 0.5) * 8 / (n + offset) - 0.5 for c, n in zip((y, x), cells, strict=True)]
            for i in range(int(np.floor(at[0])) - 1, int(np.floor(at[0])) + 3):
                for j in range(int(np.floor(at[1])) - 1, int(np.floor(at[1])) + 3):
                    weight = cubic(at[0] - i) * cubic(at[1] - j)
                    expected[y, x] += weight * grid_of_8[np.clip(i, 0, 7), np.clip(j, 0, 7)]
    found = network._resampled(*cells)[0]
    np.testing.assert_allclose(found[0], stored[0])
    np.testing.assert_allclose(found[1:].reshape(expected.shape), expected, atol=1e-5)


def test_bfloat16_gives_float32_features_close_to_those_of_float32(folder, images):
    reduced = Dino(folder, method="test", device="cpu", dtype="bfloat16")
    exact = Dino(folder, method="test", device="cpu", dtype="float32")
    for one, other in zip(reduced(images, fit="pad"), exact(images, fit="pad"), strict=True):
        assert one.patches.dtype == torch.float32
        difference = (one.patches - other.patches).norm() / other.patches.norm()
        assert 0 < difference < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("auto", 0.02)])
def test_a_gpu_gives_the_features_of_the_cpu_in_order(dtype, tolerance, folder, images, monkeypatch):
    monkeypatch.setattr(module, "TOKENS", 45)  # three images of 3 x 5 patches at once, and then the fourth
    options = {"method": "test", "dtype": dtype}
    of_gpu = list(Dino(folder, device="cuda", **options)(images, fit="pad", cls_attention=True))
    of_cpu = Dino(folder, device="cpu", method="test", dtype="float32")(images, fit="pad", cls_attention=True)
    for one, other in zip(of_gpu, of_cpu, strict=True):
        assert one.grid == other.grid and one.patches.is_cuda and one.patches.dtype == torch.float32
        assert (one.patches.cpu() - other.patches).norm() <= tolerance * other.patches.norm()
        assert (one.cls_attention.cpu() - other.cls_attention).abs().max() <= tolerance


def test_dinov2_with_and_without_registers_is_what_the_whole_model_computes(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    settings = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**settings, use_swiglu_ffn=True)).save_pretrained(tmp_path / "plain")
    pixels = torch.randn(1, 3, 42, 84)
    for path, registers in ((tmp_path / "plain", 0), (dino_pca.write_model(tmp_path / "registers"), 4)):
        network = Dino(path, method="test", device="cpu")
        assert network.special == 1 + registers and network.positions == "hf" and network.patch == 14
        expected = network.network(pixels).last_hidden_state
        torch.testing.assert_close(network.tokens(pixels, facet="token_norm")[0], expected)
        patches, attention = network.forward(pixels, facet="token_norm", cls_attention=True)
        torch.testing.assert_close(patches, expected[:, 1 + registers :])
        assert attention.shape == (1, 2, 18) and (attention.sum(2) < 1).all()


def test_cells_become_pixels_in_each_geometry(network):
    image = np.zeros((20, 29, 3), np.uint8)
    cells = np.arange(12).reshape(3, 4)
    (padded,) = network([image], fit="pad")
    np.testing.assert_array_equal(padded.enlarged(cells, (20, 29)), cells.repeat(8, 0).repeat(8, 1)[:20, :29])
    (cropped,) = network([image], fit="crop")
    expected = np.pad(cells[:2, :3].repeat(8, 0).repeat(8, 1), ((0, 4), (0, 5)), "edge")
    np.testing.assert_array_equal(cropped.enlarged(cells[:2, :3], (20, 29)), expected)
    (resized,) = network([image], fit="resize")  # to 16 x 32
    rows, columns = np.arange(20) * 2 // 20, np.arange(29) * 4 // 29
    np.testing.assert_array_equal(resized.enlarged(cells[:2], (20, 29)), cells[rows[:, None], columns])
    stacked = padded.enlarged(np.stack([cells, cells > 5]), (20, 29))
    assert stacked.shape == (2, 20, 29)


def test_cells_of_overlapping_patches_lie_round_their_centres(folder):
    (found,) = Dino(folder, method="test", device="cpu", stride=4)([np.zeros((16, 24, 3), np.uint8)], fit="pad")
    assert found.grid == (3, 5) and found.patch == 4 and found.margin == 2
    columns = found.enlarged(np.tile(np.arange(5), (3, 1)), (16, 24))[0]
    assert columns.tolist() == [0] * 6 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 6


def test_overlapping_patches_take_an_image_as_it_is(folder):
    network = Dino(folder, method="test", device="cpu", stride=2)
    image = np.random.default_rng(0).integers(0, 256, (24, 35, 3)).astype(np.uint8)
    (found,), (cut,) = (network([each], fit="free") for each in (image, image[:, :34]))
    assert found.grid == (9, 14)  # 1 + (35 - 8) // 2; whole patches would be 8 + 2 * 12 px wide, or 40
    torch.testing.assert_close(found.patches, cut.patches, rtol=0, atol=0)


def test_a_panorama_is_reduced_and_the_log_says_so_once(network, caplog):
    grid.say_reduced.cache_clear()
    images = [np.zeros((10, 3000, 3), np.uint8), np.zeros((200, 20, 3), np.uint8)]
    with caplog.at_level(logging.INFO, "raypipe"):
        found = list(network(images, fit="pad", max_side=160))
    assert [each.seen for each in found] == [(1, 160), (160, 16)]
    assert [each.grid for each in found] == [(1, 20), (20, 2)]
    assert found[0].enlarged(np.arange(20)[None], (10, 3000)).shape == (10, 3000)
    messages = [record.message for record in caplog.records]
    assert messages == ["test: images with a side of more than max_side = 160 px are reduced to it first"]


def test_features_that_are_not_finite_are_a_bad_image(folder):
    network = Dino(folder, method="test", device="cpu")
    network.network.layers[1].mlp.fc2.weight.fill_(float("nan"))
    with pytest.raises(BadImage, match="segment: non_finite: the network gives features that are no finite numbers"):
        list(network([np.zeros((16, 16, 3), np.uint8)], fit="pad"))


def test_mistakes_are_refused_by_name(folder, network):
    options = {"method": "lost", "device": "cpu"}
    with pytest.raises(ValueError, match="lost: stride must divide the 8 px of a patch, got 3"):
        Dino(folder, **options, stride=3)
    with pytest.raises(ValueError, match="lost: unknown positions 'dinov2'; did you mean 'dino'?"):
        Dino(folder, **options, positions="dinov2")
    with pytest.raises(ValueError, match="test: unknown facet 'keys'; did you mean 'key'?"):
        network.forward(torch.zeros(1, 3, 8, 8), facet="keys")
    with pytest.raises(ValueError, match="test: block must be one of the 3 of the weights, got 3"):
        network.forward(torch.zeros(1, 3, 8, 8), block=3)
    with pytest.raises(ValueError, match="test: unknown fit 'padd'; did you mean 'pad'?"):
        list(network([np.zeros((8, 8, 3), np.uint8)], fit="padd"))


def test_a_folder_of_another_network_is_refused(tmp_path):
    from support.tiny import clipseg

    with pytest.raises(ValueError, match="lost: .* a network of type 'clipseg', expected one of: vit, deit, dinov2"):
        Dino(clipseg.write_model(tmp_path), method="lost", device="cpu")
