"""`raypipe doctor`: what this machine is, what is on it, what runs where, and what is missing, on one screen.

Imports neither torch nor ray: it also works where these are broken or absent, and asks nothing of the network.
"""

from __future__ import annotations

import ast
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from raypipe import networks, segmenters
from raypipe.cli.methods import WIDTH
from raypipe.runtime import address, cores
from raypipe.segmenters import rembg
from raypipe.types import PatternSegmenter, Segmenter

SHOWN = ("raypipe", "ray", "torch", "torchvision", "transformers", "numpy", "pyarrow", "opencv-python-headless")
READY, TO_FETCH, MISSING = "ready", "first run", "missing"  # at hand; fetched by the first run; to be got by the user
FULL, LOW = 0.1e9, 5e9  # bytes free on the disk: nothing can be written; a run or the weights may not fit
SHARED = 1e9  # bytes of shared memory below which Ray keeps its objects on the disk; containers have 64 MB


@dataclass(frozen=True)
class Doctor:
    """Tell what this machine is, which weights are at hand, what would run where, and how to get what is missing."""


@dataclass(frozen=True)
class Findings:
    """What was found. Sizes in bytes."""

    python: str
    system: str
    versions: dict[str, str | None]  # of what matters; None: not installed
    torch_cuda: str | None  # the CUDA that torch is built for; None for a build for the CPU
    cores: int
    memory: int
    free: int  # on the disk of the current folder
    driver_cuda: str  # the newest CUDA that the driver knows; "" without a driver
    gpus: list[cores.Gpu]
    device: str  # where networks would run
    jobs: str  # which Ray a job would use
    places: dict[str, str]  # where weights are looked for
    methods: list[dict]  # name, state, device, actors, ways to get what is not here
    advice: list[str]  # what could be better, and how
    prevents: list[str]  # what no labelling works with

    @property
    def exit_code(self) -> int:
        return int(bool(self.prevents))

    def text(self) -> str:
        """One screen."""
        build = f"CUDA {self.torch_cuda}" if self.torch_cuda else "for the CPU"
        shown = [f"{name} {number or 'MISSING'}" for name, number in self.versions.items()]
        shown = [
            f"{each} ({build})" if each.startswith("torch ") and self.versions["torch"] else each for each in shown
        ]
        gpus = ", ".join(f"{each.name} with {each.memory / 1e9:.0f} GB" for each in self.gpus) or "none"
        gpus += f"; the driver knows CUDA {self.driver_cuda}" if self.driver_cuda else "; no NVIDIA driver"
        memory = f"{self.memory / 1e9:.0f} GB of memory, {self.free / 1e9:,.0f} GB of disk free here"
        lines = [
            f"Python    {self.python}, {self.system}; {', '.join(shown)}",
            f"machine   {self.cores} cores, {memory}",
            f"GPU       {gpus}; networks run on {'the GPU' if self.device == 'cuda' else 'the CPU'}",
            f"jobs      {self.jobs}",
            f"weights   {', '.join(f'{name}: {place}' for name, place in self.places.items())}",
            f"\n{'method':<{WIDTH}}{'weights':<11}{'processes':<11}to get them, or do without",
        ]
        for row in self.methods:
            where = f"{row['actors']} x {'GPU' if row['device'] == 'cuda' else 'CPU'}"
            lines.append(f"{row['name']:<{WIDTH}}{row['state']:<11}{where:<11}{row['ways']}".rstrip())
        lines += [
            "",
            *(f"to do: {each}" for each in self.advice),
            *(f"PREVENTS LABELLING: {each}" for each in self.prevents),
        ]
        return "\n".join([*lines, "start with: raypipe demo"] if not self.prevents else lines)


def doctor(options: Doctor) -> Findings:
    """Look at this machine. Never raises for what it finds."""
    from huggingface_hub import constants

    offline = bool(constants.HF_HUB_OFFLINE)
    torch_cuda, (driver_cuda, gpus) = _of_build("torch", "cuda"), cores.gpus()
    fits = bool(torch_cuda and driver_cuda) and int(driver_cuda.split(".")[0]) >= int(torch_cuda.split(".")[0])
    device = "cuda" if gpus and fits else "cpu"
    methods = [_method(name, device, len(gpus), offline) for name in segmenters.names()]
    free = shutil.disk_usage(os.getcwd()).free
    wrong = _wrong_packages()
    advice = [
        *([text for name, text in wrong.items() if name == "ray"]),  # --local does without
        *_about_gpus(torch_cuda, driver_cuda, gpus),
        *_about_builds(),
        *([_about_offline()] if offline and any(row["state"] == MISSING for row in methods) else []),
        *_about_space(free),
    ]
    prevents = [text for name, text in wrong.items() if name != "ray"]
    prevents += ["the disk of the current folder is full: free some, or work elsewhere"] if free < FULL else []
    return Findings(
        platform.python_version(), f"{platform.system()} {platform.machine()}",
        {name: _installed(name) for name in SHOWN}, torch_cuda, cores.count(), cores.memory(), free,
        driver_cuda, gpus, device, _jobs(),
        {"Hugging Face": constants.HF_HOME, "rembg": str(Path(rembg.places("u2net")[0]).parent)},
        methods, advice, prevents,
    )  # fmt: skip


def _method(name: str, device: str, gpus: int, offline: bool) -> dict:
    """What a method's defaults lack here, and how many processes would run it."""
    method = segmenters.find(name)()
    state, ways = _weights(method, offline)
    if isinstance(method, PatternSegmenter) and method.foreground == "rembg" and rembg.Rembg().missing():
        state = MISSING if MISSING in (state, _fetched(offline)) else TO_FETCH
        ways = [*ways, "raypipe weights rembg --to DIR, or --foreground grabcut"]
    device = device if method.gpus else "cpu"
    per_actor = method.gpus if device == "cuda" else 0.0
    actors = cores.actors(cores.for_local_ray(), gpus=gpus, per_actor=per_actor)
    return {"name": name, "state": state, "device": device, "actors": actors, "ways": "; ".join(ways)}


def _weights(method: Segmenter, offline: bool) -> tuple[str, list[str]]:
    """Whether the networks of a method are here, and what gets those that are not."""
    lacking = [name for field in method.networks if not networks.is_here(name := getattr(method, field))]
    if missing := method.missing():
        lacking = [missing]
    elif any(not (networks.is_hub_id(name) or networks.is_address(name)) for name in lacking):
        return MISSING, [method.needs.partition(";")[0]]  # nobody has published any, or they are trained
    if not lacking:
        return READY, []
    instead = ", or --weights color" if "--weights color" in method.needs else ""
    return _fetched(offline), [f"raypipe weights {method.name} --to DIR{instead}"]


def _fetched(offline: bool) -> str:
    return MISSING if offline else TO_FETCH


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _wrong_packages() -> dict[str, str]:
    """Of what raypipe requires what is absent or of another version, with the command that mends it, by name."""
    from packaging.requirements import Requirement

    wrong = {}
    for wanted in map(Requirement, requires("raypipe") or () if _installed("raypipe") else ()):
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = _installed(wanted.name)
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
            have = f"{wanted.name} is {found}" if found else f"{wanted.name} is not installed"
            wrong[wanted.name] = f"{have}: pip install '{wanted.name}{extras}{wanted.specifier}'"
    if "ray" in wrong:
        wrong["ray"] += "; until then only `raypipe label --local` works"
    return wrong


def _of_build(package: str, name: str) -> str | None:
    """A value of a package's version.py, read and not run; None without it."""
    spec = find_spec(package)
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    for line in ast.parse(file.read_text()).body if file and file.is_file() else ():
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        if name in [getattr(target, "id", "") for target in targets] and isinstance(line.value, ast.Constant):
            return line.value.value
    return None


def _about_gpus(torch_cuda: str | None, driver_cuda: str, gpus: list) -> list[str]:
    """Why GPUs that are there would not be used."""
    if not (gpus and _installed("torch")):
        return []
    if not torch_cuda:
        return ["torch is built for the CPU, so the GPU stands idle: pip install --force-reinstall torch torchvision"]
    if int(driver_cuda.split(".")[0]) < int(torch_cuda.split(".")[0]):
        text = f"torch is built for CUDA {torch_cuda}, the NVIDIA driver knows no newer than {driver_cuda}"
        return [f"{text}, so the GPU stands idle: install a newer driver, or a torch that is built for {driver_cuda}"]
    if not _installed("onnxruntime-gpu"):
        text = "pip uninstall onnxruntime && pip install onnxruntime-gpu"
        return [f"rembg runs on the CPU: to have it on the GPU, {text}"]
    return []


def _about_builds() -> list[str]:
    """Whether torch and torchvision come from one place: else torchvision's operators are absent."""
    builds = {name: (_of_build(name, "__version__") or "").partition("+")[2] for name in ("torch", "torchvision")}
    if len(set(filter(None, builds.values()))) < 2:
        return []
    text = " and ".join(f"{name} for {build}" for name, build in builds.items())
    return [f"{text} do not fit: install both from the same index"]


def _about_offline() -> str:
    names = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
    return f"{' and '.join(names)} forbids to fetch weights: unset it, or run `raypipe weights` where there is internet"


def _about_space(free: int) -> list[str]:
    few = [f"{free / 1e9:.1f} GB of disk are free here: weights take up to 4.5 GB"] if free < LOW else []
    shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else SHARED
    text = f"{shared / 1e6:.0f} MB of shared memory make Ray slow: start the container with --shm-size=8g"
    return few + ([text] if shared < SHARED else [])


def _jobs() -> str:
    if address.joins_cluster():
        return f"join the Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: its machines decide, not this one"
    return f"start a Ray of their own with {cores.for_local_ray()} logical CPUs, or none with --local"
