"""The salient object as a soft mask, by a network of the rembg library: U2-Net unless told otherwise."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from raypipe import fetching, lookup, networks
from raypipe.lookup import one_line
from raypipe.types import Segmenter, Segments

log = logging.getLogger("raypipe")
# rembg's models that answer with one mask and run on this machine, with the licences of their weights. Left out: `sam`
# (wants points), `u2net_cloth_seg` (three masks), the cloud services (images would leave the machine), `..._custom`
# (give the file as `model`).
MODELS = {
    "birefnet-cod": "MIT",
    "birefnet-dis": "MIT",
    "birefnet-general": "MIT",
    "birefnet-general-lite": "MIT",
    "birefnet-hrsod": "MIT",
    "birefnet-massive": "MIT",
    "birefnet-portrait": "MIT",
    "bria-rmbg": "CC-BY-NC-4.0",
    "isnet-anime": "Apache-2.0",
    "isnet-general-use": "Apache-2.0",
    "silueta": "Apache-2.0",
    "u2net": "Apache-2.0",
    "u2net_human_seg": "Apache-2.0",
    "u2netp": "Apache-2.0",
}


RELEASES = "https://github.com"  # where rembg fetches them from
NO_WEIGHTS = "--foreground grabcut (or whole, or given:DIR) needs no weights"


@dataclass
class Rembg(Segmenter):
    """One soft mask: how much each pixel belongs to the salient object."""

    model: str = "u2net"  # GloPER supplement (rembg 2.0.64); or another of rembg's, or an ONNX file laid out as U2-Net

    source = "Qin et al., Pattern Recognition 2020 (U2-Net), through rembg"
    licence = "Apache-2.0 (u2net weights), MIT (rembg)"
    needs = "u2net.onnx, 176 MB: fetched on the first run, or put into U2NET_HOME, or given as an ONNX file"
    soft = True

    @property
    def gpus(self) -> float:
        """A quarter of a GPU if this installation's onnxruntime can use one; rembg[cpu], the default, cannot."""
        try:
            return 0.25 if version("onnxruntime-gpu") else 0.0
        except PackageNotFoundError:
            return 0.0

    def __post_init__(self):
        if self.model not in MODELS and not self._is_file():
            hint = lookup.suggest(self.model, MODELS)
            raise ValueError(f"rembg: {self.model!r} is an unknown model and no .onnx file; {hint}")
        if self._is_file():
            self.model = os.path.abspath(os.path.expanduser(self.model))  # workers may have another current folder
            self.needs = f"the file {self.model}"
        elif self.model != "u2net":
            self.needs = f"{self.model}.onnx: fetched on the first run, or put into U2NET_HOME, or given as a file"
            self.licence = f"{MODELS[self.model]} ({self.model} weights), MIT (rembg)"

    def _is_file(self) -> bool:
        return self.model.endswith(".onnx")

    def fetch(self) -> None:
        """Have the network's file here. Raises FileNotFoundError with the ways out, ValueError for another file."""
        begins = [b"\x08"]  # with the version, the first field
        networks.check_begins(Path(self._weights()), begins, method=self.name, expected="an ONNX file")

    def missing(self) -> str:
        if self._is_file():
            return "" if os.path.exists(self.model) else self.model
        return "" if _found(self.model) else f"{self.model}.onnx"

    def load(self, device: str) -> None:
        """Open the network, one session per actor.

        Downloads rembg's weights if they are not there yet, unless HF_HUB_OFFLINE or their licence forbids it.
        """
        self._path = Path(self._weights())
        self._threads = 1 if device == "cuda" else networks.threads()
        providers = _providers(device)
        try:
            self._session = self._kind()(self.model, _session_options(), providers=providers)
        except Exception as error:  # onnxruntime's own kinds; it reads nothing outside the file's folder
            raise ValueError(f"rembg: {self._path} cannot be read as a network: {one_line(error)}") from error
        if device == "cuda" and "CUDAExecutionProvider" not in self._session.inner_session.get_providers():
            raise RuntimeError("rembg: onnxruntime could not start on CUDA (see its lines above); use --device cpu")

    def _kind(self) -> type:
        """rembg's session class. Of our own file one of U2-Net: `u2net_custom` only takes files in its own folder."""
        if not self._is_file():
            return known_session(self.model)
        path = Path(self.model).resolve()
        if not path.is_file():  # asked on the worker: the driver need not have the file
            raise FileNotFoundError(f"rembg: there is no model file {str(path)!r}; {NO_WEIGHTS}")

        class LocalSession(known_session("u2net")):
            @classmethod
            def download_models(cls, *args, **kwargs) -> str:
                return str(path)

        return LocalSession

    def _weights(self) -> str:
        """Path of the ONNX file, downloaded if need be."""
        if self._is_file():
            return self._kind().download_models()
        there = _found(self.model)
        if networks.is_non_commercial(MODELS[self.model]) and not there:
            raise ValueError(
                f"rembg: the weights of {self.model} are not for commercial use ({MODELS[self.model]}); to accept "
                f"that, run `raypipe weights rembg --weights {self.model} --to DIR --accept-license` and set "
                "U2NET_HOME=DIR"
            )
        try:
            return there or fetch(self.model)
        except (OSError, ValueError) as error:  # requests' errors are OSError, a wrong checksum is pooch's ValueError
            chosen = "" if self.model == "u2net" else f" --weights {self.model}"
            raise FileNotFoundError(
                f"rembg: {self.model}.onnx is not on this machine and could not be fetched ({one_line(error)}); "
                f"{NO_WEIGHTS}, or run `raypipe weights rembg{chosen} --to DIR` where there is internet and set "
                f"U2NET_HOME=DIR, or put the file there: {places(self.model)[0]}, or name it: "
                "rembg:/path/file.onnx"
            ) from None

    def checksums(self) -> dict[str, str]:
        with self._path.open("rb") as file:
            return {self._path.name: hashlib.file_digest(file, "sha256").hexdigest()}

    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[Segments]:
        if self._threads == 1:
            found = map(self._alpha, images)
        else:
            # Images side by side, a thread each: its layers are too short for threads to share, which wait at each for
            # the last of them (U2-Net on two cores: 1.5 s of CPU time for an image instead of 1.1).
            found = self._side_by_side(images)
        for image, alpha in zip(images, found, strict=True):
            if alpha is None:
                yield Segments(np.zeros((1, *image.shape[:2]), np.float32), note="flat_map")
            else:
                yield Segments(alpha[None].astype(np.float32) / 255)

    def _side_by_side(self, images: Sequence[np.ndarray]) -> Iterator[np.ndarray | None]:
        with ThreadPoolExecutor(self._threads) as pool:
            yield from pool.map(self._alpha, images)

    def _alpha(self, image: np.ndarray) -> np.ndarray | None:
        """What rembg makes of an image, uint8 (H, W); None where the network's map has one value only."""
        try:
            with np.errstate(invalid="raise"):  # rembg divides the map by its range
                (alpha,) = self._session.predict(Image.fromarray(image))
        except FloatingPointError:
            return None
        return np.asarray(alpha)


def known_session(model: str) -> type:
    """rembg's session class of one of MODELS. Raises ValueError where the installed rembg does not have it yet."""
    if model not in (known := sessions()):
        raise ValueError(f"rembg: the installed rembg has no model {model!r}; upgrade it: pip install -U rembg")
    return known[model]


def sessions() -> dict[str, type]:
    """rembg's classes of networks, without its mattes, which no mask needs: `import rembg` has numba compile those.

    That takes most of a minute after an installation, then 1.5 s and 170 MB in every process. So its folder stands as
    a package of another name, whose `__init__` is not run.
    """
    if "_rembg" not in sys.modules:
        package = ModuleType("_rembg")
        package.__path__ = find_spec("rembg").submodule_search_locations
        sys.modules["_rembg"] = package
    return import_module("_rembg.sessions").sessions


def fetch(model: str) -> str:
    """Path of a model's ONNX file below U2NET_HOME, downloaded if it is not there. Raises rembg's errors."""
    if not _found(model):
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):  # as Hugging Face reads it
            raise OSError("HF_HUB_OFFLINE is set")
        fetching.check_reachable(RELEASES)
        log.info("rembg: fetching %s.onnx, once", model)
    return str(known_session(model).download_models())


def places(model: str) -> list[str]:
    """Where rembg looks for a model's file: one flat folder, and in later releases before it a folder per model."""
    flat = os.environ.get("U2NET_HOME") or os.path.join(os.environ.get("XDG_DATA_HOME") or "~", ".u2net")
    root = os.path.join(os.environ["XDG_DATA_HOME"], "rembg") if os.environ.get("XDG_DATA_HOME") else "~/.rembg"
    root = os.environ.get("U2NET_HOME") or os.environ.get("REMBG_HOME") or root
    folders = (flat, os.path.join(root, "models", model))
    return [os.path.join(os.path.expanduser(folder), f"{model}.onnx") for folder in folders]


def _found(model: str) -> str | None:
    """The file of one of rembg's models that was downloaded or copied; None where there is none."""
    return next(filter(os.path.exists, reversed(places(model))), None)


def _session_options():
    """A thread for each image that the network sees: onnxruntime's default is all cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options


def _providers(device: str) -> list[str]:
    import onnxruntime

    if device != "cuda":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeError(
            "rembg: the installed onnxruntime has no CUDA; use --device cpu, or replace it: "
            "pip uninstall onnxruntime && pip install onnxruntime-gpu"
        )
    onnxruntime.preload_dlls()  # the CUDA libraries that came with torch
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


SEGMENTER = Rembg
