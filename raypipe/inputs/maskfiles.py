"""A folder of mask files (labels, given foregrounds): which file belongs to which image, and its pixels."""

from __future__ import annotations

import csv
import difflib
import io
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np

from raypipe import storage
from raypipe.inputs import folders, maskkinds, recognise
from raypipe.inputs.items import PICTURES
from raypipe.inputs.manifest import list_inputs
from raypipe.inputs.maskkinds import LIGHT, Kind
from raypipe.storage import Folder, Location

# What tools hang on a mask's name, behind the image's or before it.
SUFFIX = re.compile(
    r"(_(mask|masks|seg|segs|segm|segmented|segmentation|label|labels|labelled|gt|ground_?truth|annotation|annotations"
    r"|anno|ann|trimap|matte|alpha|fg|foreground|cut_?out|no_?bg|rgba|pattern|saliency|labelids))+$"
)
PREFIX = re.compile(r"^((mask|seg|label|gt)_)+(?=.)")
SEGMENT = re.compile(r"(.+)_(\d+)\.png")  # a stem of our cut-outs where an image has several
SEPARATORS = re.compile(r"[\s_.-]+")
EXPORT_RECORD = "_export.json"  # in a folder that `raypipe export` wrote
MOST_COMPARED = 2000  # names of files among which one like an image's is looked for
NEAR = 0.6  # least likeness of two names that are shown as an example of what differs


@dataclass(frozen=True)
class Matches:
    """Which mask file belongs to which image."""

    location: dict[str, str]  # image key -> the file's location; images without a file of their own are left out
    unused: list[str]  # names of the files that no image has
    files: Sequence[tuple[str, str]] = ()  # name and location of all; none where they are no files
    meanings: dict[int, str] = field(default_factory=dict)  # of values, where our own export tells them


def match(folder: str, keys: Iterable[str]) -> Matches:
    """Find the mask file of each image in a folder: by relative path without extension, else by other forms of names.

    These are, one after the other: the image's whole name as the file's stem (a.jpg.png); the stem alone; both where
    letter case, Unicode form, separators and endings do not count; and where words such as `_mask` do not either. A
    form counts only if one file has it and one image, of those that no earlier form matched; two files with one path
    match nothing. So no image gets a mask that may be another's. keys: those of all images, in which one may stand
    twice. Raises ValueError when the folder holds no images, or packed ones, and FileNotFoundError when it does not
    exist.
    """
    files, meanings = _listed(folder)
    return replace(paired(files, keys), meanings=meanings)


def paired(files: Mapping[str, str], keys: Iterable[str]) -> Matches:
    """The same for files that were listed before. files: the location of each by its name."""
    keys = dict.fromkeys(keys)
    beside = {name: place for name, place in files.items() if name not in keys}
    location = _matched(keys, beside) if len(files) - len(beside) == len(keys) else {}
    if 2 * len(location) > len(keys):  # masks beside the photographs themselves
        files = beside
    else:
        location = _matched(keys, files)
    used = set(location.values())
    unused = [name for name, place in files.items() if place not in used]
    return Matches(location, unused, list(files.items()))


def _matched(keys: Iterable[str], files: Mapping[str, str]) -> dict[str, str]:
    """The location of the file of each image that has one."""
    by_path, location = _by(files, _path), {}
    for key in keys:
        if len(names := by_path.get(_path(key), ())) == 1:
            location[key] = files[names[0]]
    unused, waiting = set(files) - {by_path[_path(key)][0] for key in location}, [k for k in keys if k not in location]
    for part, of_image, of_file in FORMS if waiting and unused else ():
        by_form = _by(files, part, of_file)
        for form, claimants in _by(waiting, part, of_image).items():
            names = by_form.get(form, ())
            if len(names) == len(claimants) == 1 and names[0] in unused:
                location[claimants[0]] = files[names[0]]
                unused.remove(names[0])
        waiting = [key for key in waiting if key not in location]
    return location


def difference(key: str, names: Sequence[str], *, what: str) -> str:
    """In what an image's name differs from those of mask files that are no image's. what: the files are, for people.

    The end of a message, such as `; images are named as 'a.jpg', labels as 'a_v2.png', with '_v2' besides`.
    """
    if not names:
        return ""
    wanted = _plain(posixpath.basename(key))
    by_stem = _by(names[:MOST_COMPARED], posixpath.basename, _words)
    if len(several := by_stem.get(wanted, ())) > 1:
        return f"; several {what} could be that of {key!r}: {', '.join(map(repr, several[:3]))}"
    longer = [stem for stem in by_stem if wanted in stem]
    near = longer or difflib.get_close_matches(wanted, by_stem, n=1, cutoff=NEAR)
    name = by_stem[near[0]][0] if near else names[0]
    besides = f", with {longer[0].replace(wanted, '', 1)!r} besides" if longer and longer[0] != wanted else ""
    return f"; images are named as {key!r}, {what} as {name!r}{besides}"


def kind_of(matches: Matches, kind: Kind | None = None, **options) -> Kind:
    """The kind of a folder's masks: `recognise.recognise`, with its arguments."""
    return recognise.recognise(matches.files, kind, meanings=matches.meanings, **options)


def read(location: str, kind: Kind = LIGHT, *, max_bytes: int, max_pixels: int) -> np.ndarray:
    """A mask file as bool (H, W), read as a kind. Raises BadImage when it cannot be read or is of another kind."""
    content = storage.read_bytes(location, max_bytes=max_bytes)
    return kind.mask(maskkinds.stored(content, max_pixels=max_pixels))


def read_numbers(location: str, *, max_bytes: int, max_pixels: int) -> np.ndarray:
    """The numbers of a label map as they are stored: (H, W), integer. Raises BadImage as `read` does."""
    return maskkinds.numbers(maskkinds.stored(storage.read_bytes(location, max_bytes=max_bytes), max_pixels=max_pixels))


def _listed(folder: str) -> tuple[dict[str, str], dict[int, str]]:
    """Location of each file by its name, and what values mean where it is our own export of label maps.

    Of our own cut-outs with several segments of an image the first one stands for all, by the image's name.
    """
    is_folder = folders.kind(folder) == "folder"
    if is_folder and Folder(folder).read("run.json") is not None:
        text = f"is a run; `raypipe export {Location(folder)} --format png` makes a folder of masks of it"
        raise ValueError(f"{Location(folder)} {text}")
    table = list_inputs(folder)
    if table["start"].null_count + table["row"].null_count < 2 * len(table):
        raise ValueError(f"{Location(folder)}: masks in tars or tables are not matched; unpack them")
    files = dict(zip(table["key"].to_pylist(), table["location"].to_pylist(), strict=True))
    record = Folder(folder).read_json(EXPORT_RECORD) if is_folder else None
    record = record if isinstance(record, dict) else {}
    if record.get("format") == "png":
        lines = csv.DictReader(io.StringIO((Folder(folder).read("values.csv") or b"").decode()))
        return files, {int(line["value"]): line["name"] for line in lines}
    if record.get("format") == "cutout" and record.get("most_segments", 1) > 1:
        numbered = [(*match.groups(), files[match[0]]) for match in map(SEGMENT.fullmatch, files) if match]
        by_number = sorted(numbered, key=lambda each: int(each[1]), reverse=True)
        return {f"{stem}.png": place for stem, _, place in by_number}, {}  # the lowest one stays
    return files, {}


def _by(names: Iterable[str], *forms: Callable[[str], str]) -> dict[str, list[str]]:
    """Names by one of their forms, to which one function after the other leads."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(reduce(lambda form, to: to(form), forms, name), []).append(name)
    return found


def _path(name: str) -> str:
    return posixpath.splitext(name)[0]


def _plain(name: str) -> str:
    """A name without its ending, whatever its Unicode form, letter case and separators."""
    stem, ending = posixpath.splitext(name)
    while ending.lower() in PICTURES:
        name = stem
        stem, ending = posixpath.splitext(name)
    return SEPARATORS.sub("_", unicodedata.normalize("NFC", name).casefold())


def _words(name: str) -> str:
    """The same of a mask file, without what tools add to the image's name."""
    folder, slash, stem = _plain(name).rpartition("/")
    return folder + slash + PREFIX.sub("", SUFFIX.sub("", stem))


FORMS = (  # the part of a name that counts, and the form of an image's key and of a mask file's name
    (str, str, _path),
    (posixpath.basename, _path, _path),
    (posixpath.basename, str, _path),
    (str, _plain, _plain),
    (posixpath.basename, _plain, _plain),
    (str, _plain, _words),
    (posixpath.basename, _plain, _words),
)
