"""raypipe beside the tools that people use for the same work: the same images, the same weights, in turns.

A peer that is not there is a row that says what to install. Commands are measured as `commands` says; generators and
solvers in one process, on one thread, loading left out.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from raypipe.benchmark import processes
from raypipe.benchmark.commands import RATE, Arm, compared, crops
from raypipe.benchmark.figures import Figure, Sizes
from raypipe.benchmark.methods import photographs
from raypipe.benchmark.plain.sam import agreement
from raypipe.benchmark.turns import in_turns, ratios, segment, timed

POINTS = 16  # prompts a side: a quarter of the official generator's 32 x 32, which take minutes for an image
SIGMA = 0.5  # width of the affinities (ncut_pytorch's for cosines)
SIDES, EIGENVECTORS = (28, 60), 8  # patches a side of the graphs, and what is asked of them
OFFICIAL = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # segment-anything's name of an encoder of that width


class Missing(Exception):
    """A peer or its weights are not on this machine: what to do about it."""


def measure(
    name: str, sizes: Sizes, folder: str, *, photos: str | None = None, weights: str | None = None
) -> list[Figure]:
    """The figures of one peer. folder: an empty one. photos: a folder of images; by default crops of scikit-image's.

    weights: of the peers that run a SAM, a folder or an official file.
    """
    if name in IN_PROCESS:
        return processes.call(_in_process, name, sizes, weights)
    try:
        ours, other = COMMANDS[name]()
    except Missing as error:
        return [_skipped(name, error)]
    return compared(name, ours, other, photos or crops(folder, sizes), folder, sizes.repeats)


def names() -> list[str]:
    """All peers."""
    return [*COMMANDS, *IN_PROCESS]


def _skipped(name: str, error: Missing) -> Figure:
    return Figure(name, RATE, note=f"skipped: {error}")


# Commands


def _rembg() -> tuple[list[Arm], Arm]:
    """`rembg p`, or its loop where rembg was installed without its command, with the U2-Net that both find."""
    from raypipe.segmenters.rembg import Rembg

    if missing := Rembg().missing():
        raise Missing(f"{missing} is not on this machine; `raypipe weights rembg --to DIR`, then U2NET_HOME=DIR")
    start = [sys.executable, "-c", "from rembg.cli import main; main()", "p"]
    has_command = not subprocess.run([*start, "--help"], capture_output=True).returncode
    if has_command:
        name, command = "rembg p", [*start, "-om", "-m", "u2net"]
    else:
        name, command = "rembg in a loop", [sys.executable, "-m", "raypipe.benchmark.plain._rembg"]
    other = Arm(name, lambda photos, output: [*command, photos, output], _of_png)
    ours = [_label("--local", "rembg", "--local"), *([_label("Ray", "rembg")] if find_spec("ray") else [])]
    return ours, other


def _ray_data() -> tuple[list[Arm], Arm]:
    """A script of a page on Ray Data that runs our `kmeans`."""
    if not find_spec("ray"):
        raise Missing("needs Ray: pip install 'ray[data]'")
    command = [sys.executable, "-m", "raypipe.benchmark.plain._ray_data"]
    script = Arm("a plain script", lambda photos, output: [*command, photos, output], _of_script)
    return [_label("raypipe", "kmeans", "--foreground", "whole")], script


COMMANDS: dict[str, Callable[[], tuple[list[Arm], Arm]]] = {"rembg": _rembg, "ray-data": _ray_data}


def _label(name: str, *method: str) -> Arm:
    command = [sys.executable, "-m", "raypipe", "label", *method]
    return Arm(name, lambda photos, output: [*command, "--input", photos, "--output", output], _of_run)


def _of_run(output: str) -> dict[str, np.ndarray]:
    from raypipe import decode, load

    return {Path(row["key"]).stem: decode(row) for row in load(output).to_pylist() if not row["error"]}


def _of_png(output: str) -> dict[str, np.ndarray]:
    """Grey levels from 128 on, as a probability above a half is foreground."""
    from PIL import Image

    return {file.stem: np.asarray(Image.open(file))[None] >= 128 for file in Path(output).iterdir()}


def _of_script(output: str) -> dict[str, np.ndarray]:
    from pycocotools import mask as coco

    from raypipe.storage import open_table

    rows = [row for file in Path(output).glob("*.parquet") for row in open_table(file.read_bytes()).read().to_pylist()]
    return {Path(row["path"]).stem: np.stack([coco.decode(rle) > 0 for rle in row["masks"]]) for row in rows}


# In one process


def _in_process(name: str, sizes: Sizes, weights: str | None) -> list[Figure]:
    try:
        return IN_PROCESS[name](name, sizes, weights)
    except Missing as error:
        return [_skipped(name, error)]


def _mask_generation(name: str, sizes: Sizes, weights: str | None) -> list[Figure]:
    """transformers' pipeline; it suppresses all candidates of an image at once and drops none that a crop cuts off."""
    if not weights or not Path(weights).is_dir():
        raise Missing("needs the folder of a SAM: `raypipe weights sam --to DIR`, then --weights DIR")
    from transformers import pipeline

    ours = _sam(weights)
    peer = pipeline("mask-generation", weights, device="cpu", points_per_batch=ours.points_per_batch)

    def others(image: np.ndarray) -> np.ndarray:
        from PIL import Image

        found = peer(Image.fromarray(image), points_per_crop=POINTS)["masks"]
        return np.array([np.asarray(mask) > 0 for mask in found], bool).reshape(-1, *image.shape[:2])

    return _generators(name, "transformers' pipeline", ours, others, sizes)


def _segment_anything(name: str, sizes: Sizes, weights: str | None) -> list[Figure]:
    """The official generator."""
    if not find_spec("segment_anything"):
        raise Missing("needs segment-anything: pip install segment-anything")
    if not weights or not Path(weights).is_file():
        raise Missing("needs official weights: --weights sam_vit_b_01ec64.pth, or that of another size")
    import torch
    from segment_anything import SamAutomaticMaskGenerator, sam_model_registry

    state = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    network = sam_model_registry[OFFICIAL[state["image_encoder.pos_embed"].shape[-1]]](weights).eval()
    peer = SamAutomaticMaskGenerator(network, points_per_side=POINTS)

    def others(image: np.ndarray) -> np.ndarray:
        found = [mask["segmentation"] for mask in peer.generate(image)]
        return np.array(found, bool).reshape(-1, *image.shape[:2])

    return _generators(name, "official generator", _sam(weights), others, sizes)


def _ncut(name: str, sizes: Sizes, _weights: str | None) -> list[Figure]:
    """ncut_pytorch's Normalised Cuts of the same features, of which both make the same affinities."""
    if not find_spec("ncut_pytorch"):
        raise Missing("needs ncut_pytorch: pip install ncut-pytorch")
    import torch

    torch.manual_seed(0)  # its solver starts at random
    figures, arms = [], [_eigenvectors, _eigenvectors_of_peer]
    for side in SIDES:
        features, case = [_features(image, side) for image in photographs(sizes)], f", {side**2} nodes"
        seconds, found = in_turns(arms, features, sizes.repeats)
        memory = [[processes.peak(arm, features[0])[0]] for arm in arms]
        figures += _of_two(name, "ncut_pytorch", seconds, memory, case=case)
        for who, those in zip(("ours", "ncut_pytorch"), found, strict=True):
            left = [_residual(*pair) for pair in zip(features, those, strict=True)]
            figures.append(Figure(name, f"largest residual{case}, {who}", "", left, "0 is exact"))
        least = [float(np.abs((a * b).sum(0)).min()) for a, b in zip(*found, strict=True)]
        figures.append(Figure(name, f"least cosine of two eigenvectors{case}", "", least, f"of {EIGENVECTORS}"))
    return figures


IN_PROCESS = {"mask-generation": _mask_generation, "segment-anything": _segment_anything, "ncut": _ncut}
OF_A_SAM = ("mask-generation", "segment-anything")  # whose weights have to be named


def _sam(weights: str):
    """Our method with the official generator's settings, loaded."""
    from raypipe.segmenters.sam import Sam

    method = Sam(weights=weights, preset="library", points_per_side=POINTS, dtype="float32")
    method.load("cpu")
    return method


def _generators(name: str, peer: str, method, others: Callable, sizes: Sizes) -> list[Figure]:
    """Two ways from an image to masks, bool (N, H, W). Without a warm-up, which would take as long as an image."""
    arms = [lambda image: segment(method, [image])[0], others]
    seconds, memory, counts, agreed = [[], []], [[], []], [[], []], []
    for image in photographs(sizes):
        for _ in range(sizes.repeats):
            found = []
            for i, arm in enumerate(arms):
                spent, (grown, masks) = timed(processes.peak, arm, image)
                for kept, value in zip((seconds, memory, counts), (spent, grown, len(masks)), strict=True):
                    kept[i].append(float(value))
                found.append(masks)
        agreed.append(agreement(*found))
    figures = _of_two(name, peer, seconds, memory, case=f", {POINTS} x {POINTS} prompts")
    for who, values in zip(("ours", peer), counts, strict=True):
        figures.append(Figure(name, f"masks per image, {who}", "", values))
    note = "of any mask, both ways; 0 where one has a mask that the other has not"
    return [*figures, Figure(name, "least best IoU with the peer's masks", "", agreed, note)]


def _of_two(name: str, peer: str, seconds: Sequence, memory: Sequence, *, case: str) -> list[Figure]:
    figures = []
    for who, times, grown in zip(("ours", peer), seconds, memory, strict=True):
        figures.append(Figure(name, f"{RATE}{case}, {who}", "", ratios(np.ones(len(times)), times), "one thread"))
        figures.append(Figure(name, f"peak memory{case}, {who}", "MB", grown, "beyond what was there before"))
    note = "pairs in turns"
    return [*figures, Figure(name, f"{RATE}{case}: ours / {peer}", "x", ratios(seconds[1], seconds[0]), note)]


def _features(image: np.ndarray, side: int) -> np.ndarray:
    """What side x side patches look like, float32 (P, D)."""
    import cv2

    from raypipe.benchmark.plain.spectral import PATCH
    from raypipe.features import color

    square = cv2.resize(image, (side * PATCH, side * PATCH), interpolation=cv2.INTER_AREA)
    return color.describe(square, PATCH, max_side=max(square.shape)).patches.numpy()


def _affinity(features: np.ndarray):
    """What ncut_pytorch's `cosine_affinity` makes of features (P, D): float32 (P, P)."""
    import torch

    unit = torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(features)), dim=1)
    return (-(((unit @ unit.T) - 1) ** 2) / (2 * SIGMA**2)).exp() + 1e-3


def _eigenvectors(features: np.ndarray) -> np.ndarray:
    """The largest eigenvectors of D^-1/2 W D^-1/2, of length 1: (P, EIGENVECTORS)."""
    from raypipe import spectral

    weights = _affinity(features)
    degree = weights.double().sum(1)
    _, vectors = spectral.smallest_eigenpairs(spectral.dense(weights[None]), degree[None], EIGENVECTORS)
    return (vectors[0] * degree.sqrt()).T.numpy()


def _eigenvectors_of_peer(features: np.ndarray) -> np.ndarray:
    import torch
    from ncut_pytorch import ncut_fn
    from ncut_pytorch.utils.math import cosine_affinity

    features = torch.from_numpy(np.ascontiguousarray(features))
    vectors, _ = ncut_fn(features, n_eig=EIGENVECTORS, affinity_fn=cosine_affinity, sigma=SIGMA)
    return vectors.double().numpy()


def _residual(features: np.ndarray, vectors: np.ndarray) -> float:
    """By how much a product with the matrix turns the worst of some eigenvectors of length 1, (P, K)."""
    weights = _affinity(features).double().numpy()
    root = np.sqrt(weights.sum(1))
    image = weights / root / root[:, None] @ vectors
    return float(np.linalg.norm(image - vectors * (image * vectors).sum(0), axis=0).max())
