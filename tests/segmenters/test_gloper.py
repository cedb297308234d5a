"""GloPER against its plain loop, on pictures whose pattern is known, and at the ends of its range."""

import dataclasses
import math
import weakref

import numpy as np
import pytest
from PIL import Image
from skimage import data

from raypipe.evaluation.tasks.pattern import count, dice
from raypipe.segmenters.gloper import PRESETS, Gloper, enlarge

torch = pytest.importorskip("torch")

from raypipe.benchmark.plain import gloper as plain_gloper  # noqa: E402
from raypipe.segmenters.gloper import fit as gloper_fit  # noqa: E402
from raypipe.segmenters.gloper import unet as gloper  # noqa: E402
from raypipe.segmenters.gloper.fit import Fitter, Problems, Settings, distance, margin  # noqa: E402

WIDTHS = (4, 8, 8, 16, 16)
TINY = {"size": 32, "steps": 3, "widths": WIDTHS, "local_sizes": (4, 8), "seeds": 1, "foreground": "whole"}
SETTINGS = Settings(WIDTHS, steps=4, lr=1e-3, weight_decay=0.01, tau=0.5, dtype="float32")
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
on_gpu = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """Two photographs, (2, 3, 64, 96) in [0, 1]."""
    images = [Image.fromarray(picture()).resize((96, 64)) for picture in (data.chelsea, data.astronaut)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture
def stripes() -> tuple[np.ndarray, np.ndarray]:
    """Wavy dark stripes on a light coat under uneven light, and where they are: (90, 120)."""
    y, x = np.mgrid[:90, :120]
    dark = np.sin((x + 4 * np.sin(y / 15)) / 4.5) > 0.3
    light = 0.75 + 0.25 * y / 90
    coat = np.where(dark[..., None], (70, 50, 40), (220, 190, 150)) * light[..., None]
    return (coat + np.random.default_rng(0).normal(0, 6, coat.shape)).clip(0, 255).astype(np.uint8), dark


def loaded(**options) -> Gloper:
    segmenter = Gloper(**TINY | options)
    segmenter.load("cpu")
    return segmenter


def found(image: np.ndarray, foreground: np.ndarray | None = None, **options):
    foreground = np.ones(image.shape[:2], bool) if foreground is None else foreground
    (segments,) = loaded(**options).segment([image], [foreground])
    return segments


def published(seed: int) -> plain_gloper.PlainUnet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return plain_gloper.PlainUnet(WIDTHS)


def gumbel(steps: int, seed: int = 0) -> torch.Tensor:
    return -torch.empty(steps, 1, 2, 64, 96).exponential_(generator=torch.Generator().manual_seed(seed)).log()


# The network and one step


def test_the_seed_gives_the_published_networks_weights_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    weights = gloper.initial_weights(WIDTHS, 7)
    assert torch.equal(torch.get_rng_state(), state)
    stored = dict(published(7).named_parameters())
    assert all(torch.equal(value, stored[name]) for name, value in weights.items())
    left_out = {name for name in stored if ".conv" in name and name.endswith("bias")}
    assert set(stored) - set(weights) == left_out


@pytest.mark.parametrize("limits", [(gloper.SMALL_MAP, gloper.TAPS_SIDE), (0, 0), (10**6, 10**6)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_networks_side_by_side_give_what_each_gives_alone(x, limits, layout, monkeypatch):
    monkeypatch.setattr(gloper, "SMALL_MAP", limits[0])
    monkeypatch.setattr(gloper, "TAPS_SIDE", limits[1])
    networks, seeds = gloper.Unets(WIDTHS, 4), (1, 2, 3, 1)
    networks.load_state_dict(gloper.stack([gloper.initial_weights(WIDTHS, seed) for seed in seeds]))
    if layout is torch.channels_last and limits[1]:
        pytest.skip("only the way that a GPU takes has this layout")
    together = x[[0, 1, 0, 1]].flatten(0, 1)[None].contiguous(memory_format=layout)
    logits, fine, coarse = networks(together, (4, 8))
    for i, seed in enumerate(seeds):
        alone = published(seed)(x[[i % 2]], (4, 8)[i // 2])
        for one, other in zip((logits[i], fine[i // 2][i % 2], coarse[i // 2][i % 2]), alone, strict=True):
            # normalising small maps of few channels enlarges rounding
            torch.testing.assert_close(one[None], other, atol=2e-3, rtol=0)


def test_the_optimisation_follows_the_plain_loop(x):
    noise, foreground = gumbel(SETTINGS.steps), (gumbel(1, seed=1)[0, :, 0] > -0.2).float()
    problems = Problems((1, 3, 64, 96), (4, 8), 1, SETTINGS, CPU)
    results = problems.fit(x[:1], foreground, [5], noise[:, :, 1] - noise[:, :, 0])
    for size, fitted in zip((4, 8), results, strict=True):
        weight, (fine, coarse), losses = plain_gloper.fit(
            published(5),
            x[:1],
            foreground,
            size,
            steps=SETTINGS.steps,
            tau=0.5,
            lr=1e-3,
            noise=lambda step, _: noise[step],
        )
        torch.testing.assert_close(fitted.losses[0, 0, 0], losses[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(fitted.losses[:, 0, 0], losses, atol=2e-3, rtol=0)
        torch.testing.assert_close(fitted.fine[0], fine, atol=5e-3, rtol=0)
        torch.testing.assert_close(fitted.coarse[0], coarse, atol=5e-3, rtol=0)
        ours = margin(x[0], fitted.fine[0, 0]).sigmoid()
        assert ((ours > 0.5) != (weight > 0.5)).float().mean() < 0.02


def test_sizes_seeds_and_images_side_by_side_are_those_run_alone(x, monkeypatch):
    foreground = torch.ones(2, 64, 96)
    together = Problems(x.shape, (4, 8), 2, SETTINGS, CPU).fit(x, foreground, (1, 2))
    for k, size in enumerate((4, 8)):
        for r, seed in enumerate((1, 2)):
            for b in (0, 1):
                (alone,) = Problems((1, 3, 64, 96), (size,), 1, SETTINGS, CPU).fit(x[[b]], foreground[[b]], (seed,))
                torch.testing.assert_close(together[k].losses[:, r, b], alone.losses[:, 0, 0], atol=2e-3, rtol=0)
                torch.testing.assert_close(together[k].fine[r, b], alone.fine[0, 0], atol=1e-2, rtol=0)


@pytest.mark.parametrize("pixels", [1, 10**9])
def test_the_fitter_gives_seeds_and_sizes_in_their_order(x, pixels, monkeypatch):
    monkeypatch.setattr(gloper_fit, "CPU_PIXELS", pixels)
    results = Fitter((1, 2), SETTINGS)(x[:1], torch.ones(1, 64, 96), (8, 4))
    for size, fitted in zip((8, 4), results, strict=True):
        assert fitted.fine.shape == (2, 1, 2, 3, 64 // size, 96 // size) and fitted.losses.shape == (
            SETTINGS.steps,
            2,
            1,
            2,
        )
        for r, seed in enumerate((1, 2)):
            (alone,) = Problems((1, 3, 64, 96), (size,), 1, SETTINGS, CPU).fit(x[:1], torch.ones(1, 64, 96), (seed,))
            torch.testing.assert_close(fitted.losses[:, r, 0], alone.losses[:, 0, 0], atol=2e-3, rtol=0)


def test_a_second_image_starts_from_the_beginning(x):
    fitter = Fitter((3,), SETTINGS)
    first, _, again = [fitter(image[None], torch.ones(1, 64, 96), (8,))[0] for image in (x[0], x[1], x[0])]
    assert torch.equal(first.fine, again.fine) and torch.equal(first.losses, again.losses)


def test_one_logistic_draw_is_the_difference_of_two_gumbel_draws():
    problems = Problems((1, 3, 64, 96), (8,), 1, SETTINGS, CPU)
    draws = []
    for _ in range(20):
        problems._draw()
        draws.append(problems._noise.clone())
    ours, (first, second) = torch.stack(draws).flatten(), gumbel(20).unbind(2)
    levels = torch.linspace(0.01, 0.99, 50)
    step = len(ours) // 100_000 + 1
    expected = (second - first).flatten()[::step].quantile(levels)
    torch.testing.assert_close(ours[::step].quantile(levels), expected, atol=0.1, rtol=0.02)
    assert ours.var().item() == pytest.approx(math.pi**2 / 3, rel=0.02)


def test_a_pixel_that_is_met_exactly_has_no_gradient():
    x = torch.full((1, 3, 8, 8), 0.25)
    colours = torch.full((1, 1, 2, 3, 2, 2), 0.25, requires_grad=True)
    loss = distance(x, torch.ones(1, 8, 8), torch.zeros(1, 1, 8, 8), colours)
    loss.sum().backward()
    assert loss.item() < 1e-12 and torch.equal(colours.grad, torch.zeros_like(colours))


def test_the_loss_is_a_slow_loop_over_pixels():
    rng = torch.Generator().manual_seed(0)
    x, colours = torch.rand(1, 3, 8, 12, generator=rng), torch.rand(1, 1, 2, 3, 2, 3, generator=rng)
    foreground, assignment = (torch.rand(2, 1, 1, 8, 12, generator=rng) > 0.4).float()
    total = 0.0
    for i in range(8):
        for j in range(12):
            colour = colours[0, 0, int(assignment[0, 0, i, j]), :, i // 4, j // 4]
            total += foreground[0, 0, i, j].item() * math.dist(x[0, :, i, j].tolist(), colour.tolist())
    found = distance(x, foreground[0], assignment, colours)
    assert found.item() == pytest.approx(total / 96, rel=1e-5)


def test_the_margin_is_that_of_the_darker_colour_whichever_class_it_is(x):
    colours = torch.rand(1, 2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    expected = plain_gloper.fur_weight(x[:1], colours)
    torch.testing.assert_close(margin(x[0], colours[0]).sigmoid(), expected)
    torch.testing.assert_close(margin(x[0], colours[0].flip(0)).sigmoid(), expected)


# The method


def test_dark_stripes_are_found(stripes):
    image, dark = stripes
    mask = found(image, size=64, local_sizes=(8,), steps=40, widths=(8, 16, 16, 32, 32)).masks[0] > 0.5
    assert dice(count(mask, dark)) > 0.9


def test_reverse_is_the_rest_of_the_foreground(stripes):
    foreground = np.arange(120) < np.full((90, 1), 70)
    plain, reverse = (found(stripes[0], foreground, reverse=reverse).masks[0] for reverse in (False, True))
    np.testing.assert_allclose(reverse[foreground], 1 - plain[foreground], atol=1e-6)
    assert not plain[~foreground].any() and not reverse[~foreground].any()


def test_the_consensus_is_the_mean_over_sizes(stripes):
    segments = found(stripes[0], per_size=True)
    assert list(segments.labels) == ["consensus", "4", "8"]
    np.testing.assert_allclose(segments.masks[0], segments.masks[1:].mean(0), atol=1e-5)


@pytest.mark.parametrize("better", [0, 1])
def test_of_several_seeds_the_least_loss_counts(stripes, better, monkeypatch):
    single = [found(stripes[0], seed=seed).masks for seed in (41, 42)]

    def weighted(self, *arguments):
        results = call(self, *arguments)
        for fitted in results:
            fitted.losses[-1, 1 - better] += 1
        return results

    call = Fitter.__call__
    monkeypatch.setattr(Fitter, "__call__", weighted)
    np.testing.assert_allclose(found(stripes[0], seeds=2).masks, single[better], atol=1e-3)
    assert np.abs(single[0] - single[1]).max() > 1e-2


def test_another_seed_gives_another_mask(stripes):
    assert not np.array_equal(found(stripes[0]).masks, found(stripes[0], seed=42).masks)


def test_the_foreground_guides_the_optimisation(stripes):
    image = stripes[0].copy()
    left = np.arange(120) < np.full((90, 1), 60)
    whole, half = found(image, steps=10).masks[0], found(image, left, steps=10).masks[0]
    assert np.abs(whole[left] - half[left]).max() > 1e-3


def test_kept_aspect_pads_outside_the_foreground(stripes):
    segmenter = loaded(keep_aspect=True, size=48, local_sizes=(4, 8))
    image, whole = np.ascontiguousarray(stripes[0][:50]), np.ones((50, 120), bool)
    prepared = segmenter._prepared(image, whole)
    assert prepared.filled == (20, 48) and prepared.x.shape == (3, 32, 48)
    assert prepared.foreground[:20].all() and not prepared.foreground[20:].any()
    (segments,) = segmenter.segment([image], [whole])
    assert segments.masks.shape == (1, 50, 120) and segments.note == ""


def test_the_foreground_shrinks_as_the_references_cut_out_does(stripes):
    """A bicubic resize of the alpha channel, and whatever is not quite transparent: thin parts do not vanish."""
    whole = np.zeros((90, 120), bool)
    whole[20:70, 30:90] = True
    whole[70:, 41] = True  # a leg of one pixel
    prepared = loaded()._prepared(stripes[0], whole)
    cut_out = Image.fromarray(np.dstack([stripes[0], whole.astype(np.uint8) * 255]))
    alpha = np.asarray(cut_out.resize((32, 32), Image.Resampling.BICUBIC))[..., 3]
    np.testing.assert_array_equal(prepared.foreground, alpha > 0)
    assert prepared.foreground[26:, 10:12].any(1).all()


def test_lists_are_as_good_as_tuples(stripes):
    assert Gloper(widths=[2, 4, 4, 8, 8]).widths == (2, 4, 4, 8, 8)
    np.testing.assert_array_equal(
        found(stripes[0], widths=list(WIDTHS), local_sizes=[4, 8]).masks, found(stripes[0]).masks
    )


def test_sizes_that_do_not_fit_are_left_out_and_said(stripes):
    narrow = found(np.ascontiguousarray(stripes[0][:20]), keep_aspect=True, size=64, local_sizes=(4, 8), per_size=True)
    assert narrow.note == "size_skipped" and list(narrow.labels) == ["consensus", "4"]
    small = found(stripes[0], size=32, local_sizes=(4, 32), per_size=True)
    assert small.note == "size_skipped" and list(small.labels) == ["consensus", "4"]


def test_nothing_to_tell_apart_gives_empty_masks_and_a_note(stripes):
    image, one = stripes[0], np.zeros((90, 120), bool)
    one[40:50, 30:50] = True
    flat = image.copy()
    flat[30:60, 20:60] = 90  # beyond the foreground too, since resizing mixes neighbours
    for picture, foreground, note in ((flat, one, "no_contrast"), (image, np.zeros_like(one), "empty_foreground")):
        segments = found(picture, foreground, per_size=True)
        assert segments.note == note and segments.masks.shape == (3, 90, 120) and not segments.masks.any()


def test_colours_that_meet_give_an_empty_mask(stripes, monkeypatch):
    monkeypatch.setattr("raypipe.segmenters.gloper.CONTRAST", 0.9)  # of the prepared image less: 0.8 at most
    image = stripes[0].copy()
    image[0, 0], image[-1, -1] = 0, 255
    segments = found(np.repeat(np.repeat(image, 3, 0), 3, 1))
    assert segments.note == "no_contrast" and not segments.masks.any()


def test_an_optimisation_that_diverges_is_no_mask(stripes):
    segments = found(stripes[0], lr=1e38)
    assert segments.note == "diverged" and not segments.masks.any()


def test_a_size_that_diverges_leaves_the_others(stripes, monkeypatch):
    def broken(self, x, foreground, seeds):
        results = fit(self, x, foreground, seeds)
        results[0].losses[-1] = torch.nan
        return results

    whole, fit = found(stripes[0], per_size=True), Problems.fit
    monkeypatch.setattr(Problems, "fit", broken)
    segments = found(stripes[0], per_size=True)
    assert segments.note == "diverged" and not segments.masks[1].any()
    np.testing.assert_array_equal(segments.masks[0], segments.masks[2])
    np.testing.assert_array_equal(segments.masks[2], whole.masks[2])


def test_degenerate_images_among_others_keep_the_order(stripes):
    image, whole = stripes[0], np.ones((90, 120), bool)
    images = [np.zeros_like(image), image, np.full_like(image, 9), image[:, ::-1].copy()]
    results = list(loaded().segment(images, [whole] * 4))
    assert [segments.note for segments in results] == ["no_contrast", "", "no_contrast", ""]
    np.testing.assert_array_equal(results[3].masks, found(images[3]).masks)


def test_bfloat16_stays_near_float32(stripes):
    exact, reduced = (found(stripes[0], steps=10, dtype=dtype).masks for dtype in ("float32", "bfloat16"))
    assert reduced.dtype == np.float32 and 0 < np.abs(exact - reduced).max() < 0.1


def test_enlarging_drops_the_padding_and_stays_within_bounds():
    weight = np.full((16, 32), 0.9, np.float32)
    weight[:, 20:] = 0
    assert enlarge(weight, (10, 20), (37, 81)) == pytest.approx(np.full((37, 81), 0.9))
    assert enlarge(weight, (16, 32), (3, 5)).shape == (3, 5)


def test_presets_fill_what_is_not_given():
    assert Gloper(preset="paper").size == 1024 and Gloper(preset="paper", steps=7).steps == 7
    for name, values in PRESETS.items():
        assert {key: getattr(Gloper(preset=name), key) for key in values} == values
    paper = Gloper(preset="paper")
    assert (paper.local_sizes, paper.steps, paper.widths) == ((4, 8, 16, 32, 64, 128), 1000, (32, 64, 128, 256, 512))
    assert (paper.lr, paper.weight_decay, paper.tau, paper.seed, paper.seeds) == (1e-3, 0.01, 0.1, 41, 1)
    times = [Gloper(preset=name).timeout for name in ("fast", "balanced", "paper")]
    assert times == sorted(times) and times[0] > 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "quick"}, "unknown preset 'quick'"),
        ({"size": 16}, "size must be at least 32"),
        ({"size": 100}, "size must be a multiple of 16 for local sizes 4 8, got 100; take 96"),
        ({"size": 32, "local_sizes": (32,)}, "size must be at least 64 for local size 32"),
        ({"local_sizes": ()}, "local_sizes must be different numbers from 2 px on"),
        ({"local_sizes": (1, 4)}, "local_sizes must"),
        ({"local_sizes": (4, 4)}, "local_sizes must"),
        ({"widths": (8, 8, 8)}, "widths must be five numbers of channels"),
        ({"widths": (0, 8, 8, 8, 8)}, "widths must"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"tau": math.nan}, "tau must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
    ],
)
def test_impossible_parameters_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"gloper: {message}"):
        Gloper(**TINY | options)


def test_a_failed_optimisation_leaves_nothing_behind(x, monkeypatch):
    fitter, foreground, made = Fitter((1,), SETTINGS), torch.ones(2, 64, 96), weakref.WeakSet()

    def fail(problems):
        made.add(problems)
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Problems, "_step", fail)
        fitter(x, foreground, (4, 8))
    assert len(made) == 0
    again, fresh = (each(x, foreground, (4, 8)) for each in (fitter, Fitter((1,), SETTINGS)))
    assert all(torch.equal(a.losses, b.losses) for a, b in zip(again, fresh, strict=True))


def test_the_benchmark_gives_steps_of_both_formulations(stripes, monkeypatch):
    monkeypatch.setitem(plain_gloper.STEPS, "cpu", 1)
    narrow = Gloper(**TINY | {"widths": (2, 2, 2, 2, 2)})  # widths of its own: the benchmark keeps what it made
    figures = plain_gloper.compare(narrow, "cpu", [np.resize(stripes[0], (96, 96, 3))], 1)
    assert len(figures) == 6 and all(min(figure.values) > 0 for figure in figures)
    assert figures[5].figure == "times faster than plain, 64 px, 4 size(s)"


# On a GPU


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=on_gpu), pytest.param("bfloat16", marks=on_gpu)])
def test_a_gpu_follows_the_cpu_in_its_first_steps(x, dtype):
    """Each device has its own noise, and one step of it averages out over the pixels."""
    settings = dataclasses.replace(SETTINGS, steps=2, dtype=dtype)
    foreground = torch.ones(2, 64, 96)
    on_cpu = Problems(x.shape, (4, 8), 2, settings, CPU).fit(x, foreground, (1, 2))
    problems = Problems(x.shape, (4, 8), 2, settings, torch.device("cuda"))
    for one, other in zip(on_cpu, problems.fit(x.cuda(), foreground.cuda(), (1, 2)), strict=True):
        torch.testing.assert_close(one.losses, other.losses.cpu(), atol=1e-2, rtol=0.02)
        torch.testing.assert_close(one.fine, other.fine.cpu(), atol=5e-2, rtol=0)


@pytest.mark.parametrize("seeds", [pytest.param((1, 2), marks=on_gpu)])
def test_replays_on_a_gpu_start_from_the_beginning_and_learn(x, seeds):
    settings = dataclasses.replace(SETTINGS, steps=60)
    fitter, foreground = Fitter(seeds, settings), torch.ones(2, 64, 96).cuda()
    first, other, again = (fitter(x.cuda()[order], foreground, (8,))[0] for order in ([0, 1], [1, 0], [0, 1]))
    torch.testing.assert_close(first.losses, again.losses, atol=5e-2, rtol=0)
    torch.testing.assert_close(first.losses[0], other.losses[0].flip(1), atol=1e-3, rtol=0)
    assert (first.losses[-1] < first.losses[0]).all()
    assert not torch.equal(first.losses[:, 0], first.losses[:, 1])


def test_the_number_of_threads_changes_nothing():
    image, found_with = data.coffee()[::2, ::2], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found_with.append(found(image, size=64, local_sizes=(8,), steps=4, widths=(16, 32, 64, 128, 256)).masks)
    np.testing.assert_array_equal(*found_with)
