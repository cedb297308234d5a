"""`raypipe weights`: fetch what a method needs into a folder, for machines without internet."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import tyro

from raypipe import networks, segmenters
from raypipe.segmenters import rembg

SOURCE = "source.json"  # in a folder of fetched weights: which ones, of which commit and licence
LICENCES = {  # of the defaults of the methods and their siblings, from their model cards
    "CIDAS/clipseg-rd16": "Apache-2.0",
    "CIDAS/clipseg-rd64": "Apache-2.0",
    "CIDAS/clipseg-rd64-refined": "Apache-2.0",
    "facebook/dinov2-with-registers-base": "Apache-2.0",
    "facebook/dinov2-with-registers-giant": "Apache-2.0",
    "facebook/dinov2-with-registers-large": "Apache-2.0",
    "facebook/dinov2-with-registers-small": "Apache-2.0",
    "facebook/sam-vit-base": "Apache-2.0",
    "facebook/sam-vit-huge": "Apache-2.0",
    "facebook/sam-vit-large": "Apache-2.0",
}
LIKE_U2NET = ("silueta", "u2net", "u2net_human_seg", "u2netp")  # their files may be given as `rembg:FILE`


@dataclass(frozen=True)
class Weights:
    """Fetch the weights of a method into a folder and say how to use it."""

    method: tyro.conf.Positional[str]  # a method of `raypipe methods`
    to: str  # a local folder; an interrupted download goes on there
    weights: str | None = None  # a Hugging Face id, org/name or org/name@revision, or a model of rembg; None: its own
    accept_license: bool = False  # fetch weights that are not for commercial use too


@dataclass(frozen=True)
class Fetched:
    """What lies where now."""

    method: str
    weights: str
    revision: str  # commit of the Hugging Face repository; "" elsewhere
    licence: str
    folder: str
    files: dict[str, int]  # bytes by path relative to the folder
    use: tuple[str, ...]  # ways to use it

    def text(self) -> str:
        """Files, licence and what to write to use them."""
        commit = f" at commit {self.revision[:12]}" if self.revision else ""
        lines = [f"{self.weights}{commit}, licence: {self.licence}", f"{self.folder}"]
        lines += [f"  {size / 1e6:>10,.1f} MB  {name}" for name, size in self.files.items()]
        return "\n".join([*lines, *(f"use: {way}" for way in self.use)])


def weights(options: Weights) -> Fetched:
    """Fetch the weights, or complete what an interrupted call left. Files that are there already are not read again.

    Raises ValueError for a method that needs none, a licence that was not accepted, or an unknown name; OSError when
    the download fails. Messages say what helps.
    """
    kind = segmenters.find(options.method)
    if "://" in options.to:
        raise ValueError(f"weights: --to must be a local folder, got {options.to!r}")
    folder = Path(options.to).expanduser().absolute()
    if options.method == "rembg":
        return _from_rembg(options, folder)
    field = kind.__dataclass_fields__.get("weights")
    if field is None:
        raise ValueError(f"weights: {options.method} needs no weights of its own{_of_foreground(kind)}")
    chosen = options.weights or field.default
    if not networks.is_hub_id(chosen or ""):
        raise ValueError(f"weights: expected a Hugging Face id such as org/name for {options.method}, got {chosen!r}")
    return _from_hub(options, chosen, folder, _of_foreground(kind))


def _from_hub(options: Weights, chosen: str, folder: Path, hint: str) -> Fetched:
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = chosen.partition("@")
    with _explained(chosen):
        found = HfApi().model_info(name, revision=revision or None, files_metadata=True)
    licence = LICENCES.get(name) or _licence_of_card(found)
    _check_licence(chosen, licence, options)
    sizes = _needed(chosen, {each.rfilename: each.size or 0 for each in found.siblings})
    _claim(folder, {"weights": chosen, "revision": found.sha, "licence": licence})
    _check_space(folder, sizes)
    with _explained(chosen):
        snapshot_download(name, revision=found.sha, local_dir=folder, allow_patterns=list(sizes))
        # Where the Hub cannot be reached any more it returns an incomplete folder: so look at each file.
        files = {file: (folder / file).stat().st_size for file in sizes}
    ways = (f"raypipe label {options.method} --weights {shlex.quote(str(folder))}{hint}",)
    return Fetched(options.method, chosen, found.sha, licence, str(folder), files, ways)


def _from_rembg(options: Weights, folder: Path) -> Fetched:
    model = options.weights or segmenters.find("rembg").__dataclass_fields__["model"].default
    if model not in rembg.MODELS:
        rembg.Rembg(model=model)  # raises ValueError with the nearest name
        raise ValueError(f"weights: expected a model of rembg, got the file {model!r}")
    session, licence = rembg.known_session(model), rembg.MODELS[model]
    _check_licence(model, licence, options)
    with _environment("U2NET_HOME", str(folder)), _explained(model):
        file = Path(rembg.fetch(session))
    ways = [f"U2NET_HOME={shlex.quote(str(folder))} raypipe label METHOD --foreground rembg:{model}"]
    if model in LIKE_U2NET:
        ways.append(f"raypipe label METHOD --foreground {shlex.quote(f'rembg:{file}')}")
    files = {str(file.relative_to(folder)): file.stat().st_size}
    return Fetched("rembg", model, "", licence, str(folder), files, tuple(ways))


def _needed(chosen: str, sizes: dict[str, int]) -> dict[str, int]:
    """The files of a repository that `from_pretrained` reads, with their sizes."""
    names = [name for name in sizes if "/" not in name]
    files = [name for name in names if _fits(name, networks.FILES)]
    if not any(name.endswith(".safetensors") for name in files):
        files += [name for name in names if _fits(name, networks.OLD_WEIGHTS)]
    if not any(_fits(name, networks.WEIGHTS) for name in files):
        raise ValueError(f"weights: {chosen} has neither model.safetensors nor pytorch_model.bin")
    return {name: sizes[name] for name in files}


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _licence_of_card(found) -> str:
    """The licence that a repository's card names, as the Hub tags it."""
    licence = next((tag.removeprefix("license:") for tag in found.tags or () if tag.startswith("license:")), "")
    if licence == "other" and found.card_data:
        licence = found.card_data.get("license_name") or licence
    return licence or "unknown (the model card names none; read it before use)"


def _check_licence(chosen: str, licence: str, options: Weights) -> None:
    if networks.is_non_commercial(licence) and not options.accept_license:
        text = f"weights: {chosen} is not for commercial use (licence {licence}); add --accept-license to accept that"
        raise ValueError(text)


def _claim(folder: Path, source: dict) -> None:
    """Create a folder for one repository's files. Raises ValueError when it holds anything else: they would mix."""
    note = folder / SOURCE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"weights: --to {folder} is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()):
        held = json.loads(note.read_text()).get("weights") if note.is_file() else "other files"
        if held != source["weights"]:
            raise ValueError(f"weights: {folder} holds {held} already; choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(source, indent=1) + "\n")


def _check_space(folder: Path, sizes: dict[str, int]) -> None:
    missing = sum(size for name, size in sizes.items() if not (folder / name).exists())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise OSError(f"weights: {missing / 1e9:,.1f} GB to fetch but {free / 1e9:,.1f} GB free at {folder}")


def _of_foreground(kind: type) -> str:
    """A hint where the method's usual foreground needs weights."""
    field = kind.__dataclass_fields__.get("foreground")
    needs_rembg = field is not None and (field.default or "rembg").startswith("rembg")
    return "; its foreground does: raypipe weights rembg --to DIR" if needs_rembg else ""


@contextmanager
def _explained(chosen: str) -> Iterator[None]:
    """Turn what a download raises into one line: ValueError for a wrong name, OSError for anything else."""
    from huggingface_hub import errors

    wrong_name = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    try:
        yield
    except Exception as error:
        is_wrong = isinstance(error, wrong_name) and not isinstance(error, errors.GatedRepoError)
        text = f"weights: {chosen} could not be fetched: {networks.reason(error)}"
        if is_wrong:
            raise ValueError(text) from error
        raise OSError(f"{text}; once that is mended the same command goes on") from error


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
