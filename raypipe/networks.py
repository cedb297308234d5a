"""What methods with neural networks share: where weights are, whether they fit, how precisely they run, what they see.

Torch, transformers and huggingface_hub are imported where they are needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import numpy as np

from raypipe.fetching import check_reachable, fetch_file, name_of, reason
from raypipe.lookup import one_line, suggest
from raypipe.types import Segmenter

log = logging.getLogger("raypipe")
LFS_POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in the place of a large file
WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.pth.tar")  # suffixes of weight files
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # what `from_pretrained` reads of a repository
OLD_WEIGHTS = ("pytorch_model*.bin",)  # read instead where a repository has no safetensors
NESTED = ("[!1]*/*",)  # variants for other libraries lie in folders of a repository; what 1_Pooling says is wanted
OF_ONE = "lost"  # a method of one network, as which `raypipe weights` fetches any alone
OPEN_CLIP = "open_clip_config.json"  # what a folder of open_clip says of its network
SMALL = 10_000_000  # numbers that need no memory to speak of
MAX_LAYERS = 1000  # of a network; the largest here has 40
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


def settle_options(method: Segmenter) -> None:
    """Settle the fields that `method.networks` lists, and check those that have a few values only.

    Paths become absolute, for workers may have another current folder. Where `weights` is a folder with a folder for
    each of several networks (what `raypipe weights` makes), the fields at their defaults name these. To be called in
    `__post_init__`. Raises ValueError for an unknown value, no weights, and an incomplete folder.
    """
    for field, hint in get_type_hints(type(method)).items():
        if get_origin(hint) is Literal and (value := getattr(method, field)) not in (known := get_args(hint)):
            raise ValueError(f"{method.name}: unknown {field} {value!r}; {suggest(value, known)}")
    _spread(method)
    for field in method.networks:
        weights = getattr(method, field)
        if not weights:
            raise ValueError(f"{method.name}: {field} must be a folder or a Hugging Face id, got {weights!r}")
        if (path := Path(weights).expanduser()).exists():
            setattr(method, field, str(path.absolute()))


def locate_each(method: Segmenter) -> dict[str, Path]:
    """The folder or file of each network of a method, or of the recipe of one, by field; see `locate`."""
    options = {field: "weights" if isinstance(method, Segmenter) else field for field in method.networks}
    return {name: locate(getattr(method, name), method=method.name, option=each) for name, each in options.items()}


def look_for_each(method: Segmenter) -> None:
    """Have the networks of a method on this machine, fetched if need be, and see from afar whether they are networks.

    Quick and small: reads the first bytes of weight files, and config.json. Raises what `locate` raises, and ValueError
    for files that are no checkpoint or of another architecture (`model_types`).
    """
    for field, path in locate_each(method).items():
        for file in _weight_files(path):
            begins = [b"PK\x03\x04", b"\x80"]  # of torch, and of torch before 1.6
            if file.suffix == ".safetensors":
                with file.open("rb") as content:
                    begins = [content.read(8) + b"{"]  # a length, then JSON
            check_begins(file, begins, method=method.name, expected="a checkpoint")
        expected, config = method.model_types.get(field), path / "config.json"
        if path.is_dir() and expected and config.is_file() and not (path / OPEN_CLIP).is_file():
            found = json.loads(config.read_bytes()).get("model_type")
            if found != expected:
                text = f"{field} {str(path)!r} holds a network of type {found!r}, expected {expected!r}"
                raise ValueError(f"{method.name}: {text}; `raypipe weights {method.name} --to DIR` fetches one")


def check_begins(file: Path, beginnings: Sequence[bytes], *, method: str, expected: str) -> None:
    """Raise ValueError for a file that does not begin as one of its kind does. expected: what it should be."""
    with file.open("rb") as content:
        head = content.read(32)
    if head.startswith(LFS_POINTER):
        raise ValueError(f"{method}: {file} is a pointer of Git LFS, not {expected}; run `git lfs pull` in its folder")
    if not head.startswith(tuple(beginnings)):
        raise ValueError(f"{method}: {file} is not {expected}: it begins with {head[:12]!r}; fetch it again")


def locate(weights: str, *, method: str, option: str = "weights") -> Path:
    """The folder or file of weights: a local path as it is; of a Hugging Face id or an address, fetched once.

    weights: also `org/name[@revision]`, or where a checkpoint file is on the web. option: that names them, of `label`
    or else of `train`. Raises FileNotFoundError that names the method, the weights and the ways out.
    """
    path = Path(weights).expanduser()
    if path.exists():
        if not _weight_files(path):
            expected = f"expected one of {', '.join(WEIGHTS)}; `raypipe weights {method} --to DIR` fetches them"
            raise FileNotFoundError(f"{method}: {path.resolve()} holds no weights; {expected}")
        return path.resolve()
    if not (is_hub_id(weights) or is_address(weights)):
        expected = "a Hugging Face id org/name nor the address of a checkpoint file"
        raise FileNotFoundError(f"{method}: weights {weights!r} is neither a folder nor a file nor {expected}")
    from huggingface_hub import constants, snapshot_download

    name, _, revision = weights.partition("@")
    command = method if option == "weights" else f"{OF_ONE} --weights {weights}"
    way_out = f"run `raypipe weights {command} --to DIR` where there is internet"
    way_out = f"{way_out} and pass --{option.replace('_', '-')} DIR"
    try:
        if is_address(weights):
            return fetch_file(weights, _cache_of(weights), method=method)
        if not (constants.HF_HUB_OFFLINE or _is_cached(name, revision)):
            check_reachable(constants.ENDPOINT)
            log.info("%s: fetching %s from Hugging Face, once", method, weights)
        for patterns in ([*FILES], [*FILES, *OLD_WEIGHTS]):
            options = {"allow_patterns": patterns, "ignore_patterns": [*NESTED]}
            path = Path(snapshot_download(name, revision=revision or None, **options))
            if _weight_files(path):
                return path
    except Exception as error:  # many kinds: offline, no such repository, gated, no space
        text = f"no weights {weights!r} here and they could not be fetched ({reason(error)})"
        raise FileNotFoundError(f"{method}: {text}; {way_out}") from error
    # offline, what an interrupted download left counts as the repository
    raise FileNotFoundError(f"{method}: weights {weights!r} are incomplete: {path} holds none; {way_out}")


def is_here(weights: str) -> bool:
    """Whether weights lie on this machine: where they say, or fetched before. Asks nobody, imports no torch."""
    if (path := Path(weights).expanduser()).exists():
        return bool(_weight_files(path))
    if is_address(weights):
        return (_cache_of(weights) / name_of(weights)).is_file()
    name, _, revision = weights.partition("@")
    return is_hub_id(weights) and _is_cached(name, revision)


def told_classes(weights: str) -> str | None:
    """The names of classes in the config.json of a local folder of weights, as `classes.read` takes them, if any."""
    config = Path(weights).expanduser() / "config.json"
    found = json.loads(config.read_bytes()).get("classes") if config.is_file() else None
    names = [each["name"] if isinstance(each, dict) else each for each in found or ()]
    return json.dumps(names, ensure_ascii=False) if names else None


def is_hub_id(weights: str) -> bool:
    """Whether a text reads as `org/name` or `org/name@revision`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", weights) is not None


def is_address(weights: str) -> bool:
    """Whether a text reads as the address of a checkpoint file on the web."""
    place = urlsplit(weights)
    return place.scheme in ("http", "https") and any(PurePosixPath(place.path).match(kind) for kind in WEIGHTS)


def is_non_commercial(licence: str) -> bool:
    """Whether a licence's name (CC-BY-NC-4.0, ...-noncommercial-..., ...-research-...) rules out commercial use."""
    return re.search(r"\bnc\b|non-?commercial|research", licence.lower()) is not None


def checksums(path: Path) -> dict[str, str]:
    """sha256 of the weight files in a folder, or of one file, by name."""
    sums = {}
    for file in _weight_files(path):
        with file.open("rb") as content:
            sums[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return sums


def digest(tensors: Mapping) -> str:
    """sha256 of a network's tensors in float32 by name: the same of every file that holds this network."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        total.update(tensors[name].float().cpu().contiguous().numpy().astype("<f4").tobytes())
    return total.hexdigest()


def checksums_of_each(paths: Mapping[str, Path]) -> dict[str, str]:
    """sha256 of the weight files of several networks, by `FIELD/FILE`. paths: those of `locate_each`."""
    return {f"{field}/{name}": value for field, path in paths.items() for name, value in checksums(path).items()}


def pretrained(kind: type, path: Path, *, method: str, device: str, **options):
    """A transformers model in float32 on the device, ready to use.

    kind: the model's class. options: go to its `from_pretrained`, such as add_pooling_layer=False for a ViT without
    one; with config and state_dict, tensors by name, the path is only what errors name. Raises ValueError when not all
    of its weights are there, for transformers would fill the rest with random numbers, and for given ones left over.
    """
    import torch
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    logging.set_verbosity_error()  # else a table of all that is absent; the first one is named below
    given = options.get("state_dict")
    try:
        _check_size(kind, path, options.get("config"))
        options |= {"dtype": torch.float32, "local_files_only": True, "ignore_mismatched_sizes": True}
        network, found = kind.from_pretrained(path if given is None else None, output_loading_info=True, **options)
    except Exception as error:  # many kinds: no configuration, torn files, another architecture
        raise ValueError(f"{method}: {path} cannot be read as a {kind.__name__}: {one_line(error)}") from error
    absent = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if absent:
        text = f"{len(absent)} of its tensors are absent or of another shape, the first is {absent[0]}"
        raise ValueError(f"{method}: {path} holds no {kind.__name__}: {text}")
    if given and (left := sorted(found["unexpected_keys"])):
        text = f"{len(left)} of its tensors belong to none, the first is {left[0]}"
        raise ValueError(f"{method}: {path} holds no {kind.__name__}: {text}")
    return network.eval().requires_grad_(False).to(device)


def _check_size(kind: type, path: Path, config) -> None:
    """Raise ValueError when a configuration describes more than its weight files can hold.

    transformers makes what it does not find, or finds in another shape, however large it is.
    """
    import torch

    if config is None:
        settings = json.loads((path / "config.json").read_bytes())
        if (layers := max(_numbers_of_layers(settings), default=0)) > MAX_LAYERS:  # first: the class itself counts them
            raise ValueError(f"its configuration asks for {layers:,} layers")
        config = kind.config_class.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):  # no memory and no time for random numbers
        network = kind(config)
    described = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    held = sum(file.stat().st_size for file in _weight_files(path))  # a tensor may say more than its file has
    if described > max(held, SMALL):
        raise ValueError(f"its configuration asks for {described:,} numbers, the weight files have {held:,} bytes")


def _numbers_of_layers(settings: object) -> Iterator[int]:
    """The values of all settings named `...layers`, in settings within settings too."""
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, dict):
            yield from _numbers_of_layers(value)
        elif name.endswith("layers") and isinstance(value, int):
            yield value


@contextmanager
def autocast(device: str, dtype: str) -> Iterator[None]:
    """A context in which networks run in bfloat16 where that holds; float32 otherwise.

    dtype: float32, bfloat16, or auto = bfloat16 on a GPU that computes in it. Masks and decisions stay float32: that is
    the caller's part.
    """
    import torch

    can_reduce = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    reduced = dtype == "bfloat16" or (dtype == "auto" and can_reduce)
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision, torch.get_float32_matmul_precision()
    # what is float32 stays so; a GPU's own default for convolutions, and in NVIDIA's containers for matrices, is TF32:
    # 11 of the 24 bits
    convolutions.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, torch.bfloat16, enabled=reduced):
            yield
    finally:
        convolutions.fp32_precision = before[0]
        torch.set_float32_matmul_precision(before[1])


def keep_products_exact(device: str) -> None:
    """Have float32 matrices multiplied in float32 on a GPU, in this process.

    For methods that compare similarities with fixed numbers. It is torch's default, but NVIDIA's containers ask for
    TF32, 11 of the 24 bits (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE).
    """
    if device == "cuda":
        import torch

        torch.set_float32_matmul_precision("highest")


def batches(images: Sequence[np.ndarray], device: str) -> Iterator[Sequence[np.ndarray]]:
    """What goes through a network at once: all images on a GPU, each alone on the CPU.

    A CPU gains next to nothing from a batch, and alone the result does not depend on the images beside it.
    """
    step = max(1, len(images)) if device == "cuda" else 1
    for first in range(0, len(images), step):
        yield images[first : first + step]


def squeeze(image: np.ndarray, size: int) -> np.ndarray:
    """RGB uint8 (size, size, 3) of an image (H, W, 3), bilinear over all that a pixel covers, as Pillow rounds it."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def squeeze_as_torchvision(image: np.ndarray, size: int) -> np.ndarray:
    """The same as torchvision rounds it, and with it the image processors of transformers: at most one level apart."""
    import torch
    from torch.nn.functional import interpolate

    planes = torch.tensor(image).permute(2, 0, 1)[None]  # a copy: images from Ray cannot be written to
    found = interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    return found[0].permute(1, 2, 0).numpy()


def pixels(images: Sequence[np.ndarray], size: int, *, device: str, normalize: bool, resize: Callable = squeeze):
    """Images as a network sees them: a float32 tensor (B, 3, size, size) on the device.

    images: RGB uint8 (H, W, 3), each squeezed to a square by `resize`: `squeeze`, or `squeeze_as_torchvision` for
    networks whose published numbers come from there. Values are in [0, 1], or with `normalize` ImageNet's mean 0 and
    deviation 1.
    """
    import torch

    squares = torch.from_numpy(np.stack([resize(image, size) for image in images]))  # (B, size, size, 3)
    batch = squares.permute(0, 3, 1, 2).to(device).float() / 255
    if not normalize:
        return batch
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (batch - mean) / std


def _spread(method: Segmenter) -> None:
    """Let a folder of folders in `weights` name each of several networks whose field is at its default."""
    names = method.networks
    if len(names) < 2 or not getattr(method, "weights", None):
        return
    folder = Path(method.weights).expanduser()
    lacking = [name for name in names if not (folder / name).is_dir()]
    if len(lacking) == len(names) or (folder.is_dir() and _weight_files(folder)):
        return
    defaults = {field.name: field.default for field in fields(method)}
    for name in names:
        if name != "weights" and getattr(method, name) != defaults[name]:
            continue
        if name in lacking:
            way_out = f"run `raypipe weights {method.name} --to {folder}` again"
            raise ValueError(f"{method.name}: weights {str(folder)!r} has no folder {name!r}; {way_out}")
        setattr(method, name, str(folder / name))


def _cache_of(address: str) -> Path:
    """The folder that a file fetched from an address goes to."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "raypipe" / hashlib.sha256(address.encode()).hexdigest()[:16]


def _is_cached(name: str, revision: str) -> bool:
    """Whether a repository's weights have been fetched before."""
    from huggingface_hub import errors, snapshot_download

    try:
        return bool(_weight_files(Path(snapshot_download(name, revision=revision or None, local_files_only=True))))
    except errors.LocalEntryNotFoundError:
        return False


def _weight_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for kind in WEIGHTS for file in path.glob(kind))


def threads() -> int:
    """Threads for a method in this process: OMP_NUM_THREADS, which Ray sets for its workers, or one per core."""
    return int(os.environ.get("OMP_NUM_THREADS") or cores())


def cores() -> int:
    """Whole cores of this process, its container's quota included; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:  # "quota period" in microseconds, or "max period"
            quota, period = file.read().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):
        return allowed
