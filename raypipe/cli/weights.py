"""`raypipe weights`: fetch what a method needs into a folder, for machines without internet."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from raypipe import fetching, networks, segmenters
from raypipe.segmenters import rembg
from raypipe.types import PatternSegmenter, Segmenter

SOURCE = "source.json"  # in a folder of fetched weights: which ones, of which commit and licence
LIKE_U2NET = ("silueta", "u2net", "u2net_human_seg", "u2netp")  # their files may be given as `rembg:FILE`


@dataclass(frozen=True)
class Weights:
    """Fetch the weights of a method into a folder and say how to use it."""

    method: tyro.conf.Positional[str]  # a method of `raypipe methods`
    to: str  # a local folder; an interrupted download goes on there
    # a Hugging Face id, org/name or org/name@revision, the address of a file, or a model of rembg; None: its own
    weights: str | None = None
    networks: tuple[str, ...] = ()  # FIELD=ID: other ones of a method with several networks, as in backbone=org/name
    accept_license: bool = False  # fetch weights that are not for commercial use too


@dataclass(frozen=True)
class Source:
    """Where the weights of one network come from."""

    weights: str  # Hugging Face id, address of a file, or a model of rembg
    revision: str  # commit of the Hugging Face repository; "" elsewhere
    licence: str

    def text(self) -> str:
        """The same on one line."""
        commit = f" at commit {self.revision[:12]}" if self.revision else ""
        return f"{self.weights}{commit}, licence: {self.licence}"


@dataclass(frozen=True)
class Fetched(Source):
    """What lies where now. The source is that of the method's `weights`."""

    method: str
    others: dict[str, Source]  # of the method's other networks, by field
    folder: str  # with a folder for each field where there are several networks
    files: dict[str, int]  # bytes by path relative to the folder
    use: tuple[str, ...]  # ways to use it

    def text(self) -> str:
        """Sources with their licences, files and what to write to use them."""
        lines = [super().text(), *(f"{field}: {source.text()}" for field, source in self.others.items()), self.folder]
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
    chosen = _chosen(options, kind)
    if options.method == "rembg":
        return _from_rembg(options, folder)
    if not chosen:
        raise ValueError(f"weights: {options.method} needs no weights of its own{_of_foreground(kind)}")
    return _from_web(options, kind, chosen, folder)


def _chosen(options: Weights, kind: type[Segmenter]) -> dict[str, str]:
    """The Hugging Face id or address of each network of a method, by field. Raises ValueError for what is none."""
    chosen = {field: kind.__dataclass_fields__[field].default for field in kind.networks}
    given = [f"weights={options.weights}"] if options.weights and chosen else []
    given = [text.partition("=")[::2] for text in (*given, *options.networks)]
    for i, (field, name) in enumerate(given):
        if field not in chosen:
            known = f"its networks are {', '.join(chosen)}" if chosen else "it has none"
            raise ValueError(f"weights: {options.method} has no network {field!r}; {known}")
        if field in dict(given[:i]):
            raise ValueError(f"weights: {field} is given twice: {dict(given[:i])[field]!r} and {name!r}")
        chosen[field] = name
    for field, name in chosen.items():
        if not (networks.is_hub_id(name or "") or networks.is_address(name or "")):
            whose = f"{options.method}'s {field}" if len(chosen) > 1 else options.method
            if name == kind.__dataclass_fields__[field].default:
                raise ValueError(f"weights: no address of {whose} is known; it needs {kind.needs}")
            expected = "a Hugging Face id such as org/name or the address of a file"
            raise ValueError(f"weights: expected {expected} for {whose}, got {name!r}")
    return chosen


def _from_web(options: Weights, kind: type[Segmenter], chosen: dict[str, str], folder: Path) -> Fetched:
    """Fetch each network, into a folder of its field where there are several. Nothing is written if one is refused.

    What is there already stays. Raises ValueError where folders of several networks would lie beside anything else.
    """
    sources, sizes, files = {}, {}, {}
    for field, name in chosen.items():
        sources[field], sizes[field] = _look_up(name, kind, field)
        _check_licence(name, sources[field].licence, options)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"weights: --to {folder} is a file; choose a folder")
    if len(chosen) > 1 and folder.is_dir() and not set(chosen).issuperset(path.name for path in folder.iterdir()):
        raise ValueError(f"weights: {folder} holds other files already; choose an empty folder")
    folders = {field: folder / field if len(chosen) > 1 else folder for field in chosen}
    for field, source in sources.items():
        _claim(folders[field], source)
    wanted = {field: {folders[field] / name: size for name, size in sizes[field].items()} for field in chosen}
    missing = sum(size for each in wanted.values() for file, size in each.items() if not file.exists())
    if missing > (free := shutil.disk_usage(folder).free):
        raise OSError(f"weights: {missing / 1e9:,.1f} GB to fetch but {free / 1e9:,.1f} GB free at {folder}")
    for field, source in sources.items():
        with _explained(source.weights):
            _fetch(source, folders[field], list(sizes[field]), method=options.method)
            # Where the Hub cannot be reached any more it returns an incomplete folder: so look at each file.
            files |= {str(file.relative_to(folder)): file.stat().st_size for file in wanted[field]}
    ways = (f"raypipe label {options.method} --weights {shlex.quote(str(folder))}{_of_foreground(kind)}",)
    first = sources.pop("weights")
    return Fetched(**asdict(first), method=options.method, others=sources, folder=str(folder), files=files, use=ways)


def _fetch(source: Source, folder: Path, names: list[str], *, method: str) -> None:
    """Fetch files of a source into a folder, but for those that are there."""
    from huggingface_hub import snapshot_download

    if networks.is_address(source.weights):
        fetching.fetch_file(source.weights, folder, method=method)
    else:
        name = source.weights.partition("@")[0]
        snapshot_download(name, revision=source.revision, local_dir=folder, allow_patterns=names)


def _look_up(chosen: str, kind: type[Segmenter], field: str) -> tuple[Source, dict[str, int]]:
    """What the Hub says of a repository, or a server of a file: its source, and the files with their sizes.

    The licence of a method's own weights is known; of others it is the model card's.
    """
    from huggingface_hub import HfApi

    if networks.is_address(chosen):
        is_default = chosen == kind.__dataclass_fields__[field].default
        licence = kind.licences.get(field) if is_default else "unknown (an address names none; read it before use)"
        with _explained(chosen):
            return Source(chosen, "", licence), fetching.size_of(chosen)
    name, _, revision = chosen.partition("@")
    with _explained(chosen):
        found = HfApi().model_info(name, revision=revision or None, files_metadata=True)
    is_default = name == kind.__dataclass_fields__[field].default
    licence = kind.licences.get(field) if is_default else None
    sizes = _needed(chosen, {each.rfilename: each.size or 0 for each in found.siblings})
    return Source(chosen, found.sha, licence or _licence_of_card(found)), sizes


def _from_rembg(options: Weights, folder: Path) -> Fetched:
    model = options.weights or segmenters.find("rembg").__dataclass_fields__["model"].default
    if model not in rembg.MODELS:
        rembg.Rembg(model=model)  # raises ValueError with the nearest name
        raise ValueError(f"weights: expected a model of rembg, got the file {model!r}")
    licence = rembg.MODELS[model]
    _check_licence(model, licence, options)
    before = os.environ.get("U2NET_HOME")
    os.environ["U2NET_HOME"] = str(folder)
    try:
        with _explained(model):
            file = Path(rembg.fetch(model))
    finally:
        del os.environ["U2NET_HOME"]
        if before is not None:
            os.environ["U2NET_HOME"] = before
    ways = [f"U2NET_HOME={shlex.quote(str(folder))} raypipe label METHOD --foreground rembg:{model}"]
    if model in LIKE_U2NET:
        ways.append(f"raypipe label METHOD --foreground {shlex.quote(f'rembg:{file}')}")
    files = {str(file.relative_to(folder)): file.stat().st_size}
    return Fetched(model, "", licence, method="rembg", others={}, folder=str(folder), files=files, use=tuple(ways))


def _needed(chosen: str, sizes: dict[str, int]) -> dict[str, int]:
    """The files of a repository that `from_pretrained` reads, with their sizes."""
    from huggingface_hub.utils import filter_repo_objects

    files = list(filter_repo_objects(sizes, allow_patterns=networks.FILES, ignore_patterns=networks.NESTED))
    if not any(name.endswith(".safetensors") for name in files):
        files += filter_repo_objects(sizes, allow_patterns=networks.OLD_WEIGHTS, ignore_patterns=networks.NESTED)
    if not any(filter_repo_objects(files, allow_patterns=networks.WEIGHTS)):
        raise ValueError(f"weights: {chosen} has neither model.safetensors nor pytorch_model.bin")
    return {name: sizes[name] for name in files}


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


def _claim(folder: Path, source: Source) -> None:
    """Create a folder for one repository's files. Raises ValueError when it holds anything else: they would mix."""
    note = folder / SOURCE
    if folder.is_dir() and any(folder.iterdir()):
        held = json.loads(note.read_text()).get("weights") if note.is_file() else "other files"
        if held != source.weights:
            raise ValueError(f"weights: {folder} holds {held} already; choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(asdict(source), indent=1) + "\n")


def _of_foreground(kind: type[Segmenter]) -> str:
    """A hint where the method's usual foreground needs weights."""
    needs_rembg = issubclass(kind, PatternSegmenter) and (kind.foreground or "rembg").startswith("rembg")
    return "; its foreground does: raypipe weights rembg --to DIR" if needs_rembg else ""


@contextmanager
def _explained(chosen: str) -> Iterator[None]:
    """Turn what a download raises into one line: ValueError for a wrong name, OSError for anything else."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:
        wrong_name = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
        text = f"weights: {chosen} could not be fetched: {fetching.reason(error)}"
        if isinstance(error, wrong_name) and not isinstance(error, errors.GatedRepoError):
            raise ValueError(text) from error
        raise OSError(f"{text}; once that is mended the same command goes on") from error
