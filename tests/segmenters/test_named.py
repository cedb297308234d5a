"""Label maps made some rows at a time are those of all scores at once."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from raypipe.segmenters import _named
from raypipe.segmenters._named import Upsampling, label_map

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = [
    ((5, 7, 9), (50, 61), ()),
    ((5, 7, 9), (50, 61), [((112, 144), (100, 140))]),
    ((4, 32, 43), (100, 133), [((512, 688), (512, 683))]),  # an image smaller than what the network sees
    ((4, 3, 43), (1, 700), [((48, 688), (33, 683))]),
    ((3, 1, 1), (1, 1), [((16, 16), (16, 16))]),
    ((2, 64, 64), (9, 9), ()),
]


def enlarged(grid: torch.Tensor, size, through) -> torch.Tensor:
    """The whole, by torch: (C, H, W)."""
    found = grid[None]
    for to, (height, width) in [*through, (size, size)]:
        found = interpolate(found, size=to, mode="bilinear")[..., :height, :width]
    return found[0]


@pytest.mark.parametrize(("shape", "size", "through"), CASES)
def test_rows_are_those_of_torchs_interpolation_and_do_not_depend_on_the_tiles(shape, size, through):
    grid = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = Upsampling(grid, size, through=through)(0, size[0])
    torch.testing.assert_close(whole, enlarged(grid, size, through), atol=1e-5, rtol=0)
    for step in (1, 7):
        rows = Upsampling(grid, size, through=through)
        tiles = [rows(first, min(first + step, size[0])) for first in range(0, size[0], step)]
        torch.testing.assert_close(torch.cat(tiles, 1), whole, atol=0, rtol=0)


def test_a_gpu_mixes_all_rows_at_once_as_a_cpu_does_part_by_part():
    wide, weights = torch.rand(3, 6, 5), torch.rand(9, 3)
    starts = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3])
    expected = [sum(wide[:, start + k] * weights[i, k] for k in range(3)) for i, start in enumerate(starts)]
    for mix in (_named.mixed, _named.mixed_at_once):
        np.testing.assert_allclose(mix(wide, starts, weights), torch.stack(expected, dim=1), rtol=1e-6)


@pytest.mark.parametrize("tile", [1, 1000, 1 << 20])
@pytest.mark.parametrize("temperature", [None, 1.0, 100.0])
def test_a_label_map_has_the_first_largest_class_and_its_probability(tile, temperature, monkeypatch):
    monkeypatch.setattr(_named, "TILE", tile)
    grid = torch.randn((6, 4, 5), generator=torch.Generator().manual_seed(1)) * 0.4
    grid[2] = grid.max() + 1  # between two equal ones that are largest everywhere but on the right
    grid[3] = grid[2]
    grid[2:4, :, 3:] = -1
    scores = enlarged(grid, (30, 40), ())
    found = label_map(Upsampling(grid, (30, 40)), (30, 40), list("abcdef"), temperature=temperature)
    best = scores.argmax(0).numpy()
    assert (
        list(found.labels) == ["abcdef"[i] for i in np.unique(best)] and "c" in found.labels and "d" not in found.labels
    )
    np.testing.assert_array_equal(np.array(found.labels)[found.index - 1], np.array(list("abcdef"))[best])
    largest = scores.amax(0).clamp(0, 1) if temperature is None else (scores * temperature).softmax(0).amax(0)
    np.testing.assert_allclose(found.values, largest, atol=1e-4 if temperature == 100 else 1e-6)
    assert found.index.dtype == np.uint8 and found.values.dtype == np.float32


def test_a_background_class_is_no_segment():
    grid = torch.tensor([[[0.0, 3.0]], [[1.0, 0.0]], [[0.5, 0.0]]])  # background, a, b
    found = label_map(Upsampling(grid, (2, 4)), (2, 4), ["a", "b"], temperature=1.0, background=True)
    assert list(found.labels) == ["a"]
    np.testing.assert_array_equal(found.index, [[1, 0, 0, 0]] * 2)
    assert (found.values[:, 1:] == 0).all() and 1 / 3 < found.values[0, 0] < 1
    nothing = label_map(
        lambda first, last: -torch.arange(3.0)[:, None, None].expand(3, last - first, 4).clone(),
        (2, 4),
        ["a", "b"],
        background=True,
    )
    assert nothing.masks.shape == (0, 2, 4)


def test_more_than_255_classes_need_wider_labels():
    scores = torch.randn((300, 20, 30), generator=torch.Generator().manual_seed(2))
    found = label_map(lambda first, last: scores[:, first:last].clone(), (20, 30), [str(i) for i in range(300)])
    np.testing.assert_array_equal(np.array(found.labels, int)[found.index - 1], scores.argmax(0))
    assert len(found.labels) > 200 and found.index.dtype == np.uint16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("count", [7, 300])
@pytest.mark.parametrize("background", [False, True])
def test_a_gpu_gives_the_label_map_of_a_cpu(count, background):
    grid = torch.randn((count, 9, 12), generator=torch.Generator().manual_seed(3))
    names, options = [str(i) for i in range(count - background)], {"temperature": 5.0, "background": background}
    here, there = (label_map(Upsampling(each, (90, 70)), (90, 70), names, **options) for each in (grid, grid.cuda()))
    assert (here.index == there.index).mean() > 0.999 and here.labels == there.labels
    same = here.index == there.index
    np.testing.assert_allclose(there.values[same], here.values[same], atol=1e-5)
    assert (there.index.dtype, there.values.dtype) == (here.index.dtype, here.values.dtype)


MEMORY = """
import resource, sys, numpy as np, torch
from torch.nn.functional import interpolate
from raypipe.segmenters._named import Upsampling, label_map
torch.set_num_threads(1)
size, names = (int(sys.argv[1]), int(sys.argv[2])), [str(i) for i in range(171)]
grid = torch.randn((171, 32, 43), generator=torch.Generator().manual_seed(0)) * 0.1
label_map(Upsampling(grid[:3], (40, 50)), (40, 50), names[:3], temperature=100)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
through = [((512, 688), (512, 683))]
found = label_map(Upsampling(grid, size, through=through), size, names, temperature=100)
own = peak() - before - (found.index.nbytes + found.values.nbytes) / 2**20
seen = interpolate(grid[None], size=(512, 688), mode="bilinear")[..., :683]
scores = interpolate(seen, size=size, mode="bilinear")[0]
top = scores.topk(2, dim=0)
labels = np.array(found.labels, int)[found.index - 1]
clear = (top.values[0] - top.values[1] > 1e-6).numpy()
print(own, (labels == top.indices[0].numpy())[clear].all() and clear.mean() > 0.9999)
"""


@pytest.mark.parametrize("size", [(384, 512), pytest.param((1536, 2048), marks=pytest.mark.slow)])
def test_171_classes_take_less_than_60_mb_beside_the_result(size):
    command = [sys.executable, "-c", MEMORY, *map(str, size)]
    own, equal = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert float(own) < 60 and equal == "True"
