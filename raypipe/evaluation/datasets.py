"""Data sets by name: where their photographs and labels lie beneath a root, as people unpack them, and their splits."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raypipe import images, lookup, storage
from raypipe.evaluation.tasks import boxes
from raypipe.inputs import folders
from raypipe.inputs.items import PICTURES, LeftOut
from raypipe.inputs.maskfiles import Matches
from raypipe.storage import Location, join

TASKS = {"masks": "saliency", "boxes": "boxes"}  # what data sets with such labels are for, unless told otherwise
HEAD_BYTES = 1 << 20  # of a photograph, in which its orientation is looked for


class Layout(NamedTuple):
    """Places beneath the root, of each the first that exists; braces stand for several names, as in shells."""

    images: tuple[str, ...]  # folders of photographs
    labels: tuple[str, ...]  # folders of masks or of VOC's annotations, or COCO's one file
    listed: tuple[str, ...] = ()  # files with a photograph's name per line; none = all photographs
    split: str | None = None  # which of several such files, unless told otherwise; it is the one of the papers
    holds: Literal["masks", "boxes"] = "masks"


def _duts(part: str) -> tuple[str, str]:
    return tuple(f"{{DUTS/DUTS-{part},DUTS,DUTS-{part}}}/DUTS-{part}-{what}" for what in ("Image", "Mask"))


def _voc(year: int) -> Layout:
    root = f"{{VOC{year}/,}}VOCdevkit/VOC{year}"
    split = f"{root}/ImageSets/Main/{{split}}.txt"
    return Layout((f"{root}/JPEGImages",), (f"{root}/Annotations",), (split,), "trainval", "boxes")


OMRON = "{DUT-OMRON,DUTS-OMRON}"  # how its folder is spelled
LAYOUTS = {
    "duts-tr": Layout(_duts("TR")[:1], _duts("TR")[1:]),
    "duts-te": Layout((_duts("TE")[0], "DUTS_Test/img"), (_duts("TE")[1], "DUTS_Test/gt")),
    "dut-omron": Layout(
        (f"{OMRON}/DUT-OMRON-image{{/DUT-OMRON-image,}}", "DUT_OMRON/img"),
        (f"{OMRON}/{{,DUT-OMRON-gt-pixelwise.zip/}}pixelwiseGT-new-PNG", "DUT_OMRON/gt"),
    ),
    "ecssd": Layout(("ECSSD/images", "ECSSD/img"), ("ECSSD/ground_truth_mask", "ECSSD/gt")),
    "voc07": _voc(2007),
    "voc12": _voc(2012),
    "coco20k": Layout(
        ("COCO{/images,}/train2014",),
        ("COCO/annotations/instances_train2014.json",),
        ("{,COCO/,COCO/annotations/}coco_20k_filenames.txt",),  # of LOST (Simeoni et al., BMVC 2021)
        holds="boxes",
    ),
}


@dataclass(frozen=True)
class DataSet:
    """A data set, or a split of it, as it lies on a disk. Photographs and labels belong together by their stems."""

    name: str
    split: str | None
    is_usual: bool  # of its splits it is the one that papers report
    holds: Literal["masks", "boxes"]  # what its labels are
    images: Location  # the folder of its photographs: what `label` and `sweep` take as their input
    labels: Location  # where its labels are: a folder, or COCO's one file
    stems: frozenset[str]  # of all that belongs to it
    photographs: Mapping[str, str]  # stem -> where the photograph is
    location: Mapping[str, str]  # stem -> where the label is

    def match(self, keys: Iterable[str]) -> Matches:
        """Which label belongs to which image, by stem. keys: those of all images; one may stand twice.

        Of several images with one stem, as where masks lie among them, the one counts that has its photograph's path.
        """
        claimants = defaultdict(list)
        for key in dict.fromkeys(keys):
            claimants[stem_of(key)].append(key)
        found = {}
        for stem, place in self.location.items():
            its = claimants.get(stem, ())
            its = its if len(its) < 2 else [key for key in its if self._is_at(stem, key)]
            if len(its) == 1:
                found[its[0]] = place
        unused = [posixpath.basename(place) for stem, place in self.location.items() if stem not in claimants]
        return Matches(found, unused)

    def outside(self, keys: Iterable[str]) -> set[str]:
        """The images that are none of the data set's, or of another split of it."""
        return {key for key in keys if stem_of(key) not in self.stems}

    def orientation(self, key: str) -> int:
        """How an image's label is to be turned (`images.UPRIGHT`): as its photograph's EXIF says; 1 = not at all.

        The label was made of the photograph as it is stored, unless it is a mask with EXIF of its own, by which it was
        turned when it was read. Raises BadImage when these cannot be read.
        """
        found = _orientation(self.photographs.get(stem_of(key)))
        return 1 if found > 1 and self.holds == "masks" and _orientation(self.location[stem_of(key)]) > 1 else found

    def _is_at(self, stem: str, key: str) -> bool:
        return f"/{self.photographs.get(stem, '')}".endswith(f"/{key}")


def names() -> list[str]:
    """All data sets, sorted."""
    return sorted(LAYOUTS)


def task_of(dataset: str | None) -> str:
    """The task that a data set is for; of none, which means labels of one's own, `pattern`."""
    return TASKS[LAYOUTS[dataset].holds] if dataset in LAYOUTS else "pattern"


def chosen(options) -> str | DataSet:
    """The labels that options ask for: a folder, or a data set. options: with `labels`, `dataset`, `root` and `split`.

    Raises ValueError where they name none or both, and what `find` raises.
    """
    if options.dataset is None:
        for name in ("root", "split"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} has no effect without --dataset, which is one of {', '.join(names())}")
        if options.labels is None:
            raise ValueError("no labels: name a folder of them with --labels, or --dataset NAME --root DIR")
        return options.labels
    if options.labels is not None:
        raise ValueError(f"--labels has no effect with --dataset {options.dataset}, which has its own; leave one out")
    if options.root is None:
        raise ValueError(f"--dataset {options.dataset}: add --root, the folder in which data sets lie")
    return find(options.dataset, options.root, options.split)


def find(name: str, root: str, split: str | None = None) -> DataSet:
    """A data set beneath a root. split: where it has several, such as val of voc12; None = the usual one.

    Raises ValueError for an unknown name or split, a root that lacks its folders, all of which are then named, and one
    in which no label belongs to a photograph, and FileNotFoundError for one that does not exist.
    """
    if name not in LAYOUTS:
        raise ValueError(f"unknown data set {name!r}; {lookup.suggest(name, names())}")
    layout = LAYOUTS[name]
    if split is not None and layout.split is None:
        raise ValueError(f"--split {split!r} has no effect: {name} has no splits")
    if folders.kind(root) == "missing":
        raise FileNotFoundError(storage.missing(Location(root)))
    split, usual = split or layout.split, layout.split
    patterns = [layout.images, layout.labels, *([layout.listed] if layout.listed else [])]
    patterns = [[each.replace("{split}", split or "") for each in places] for places in patterns]
    found = [_first(root, places) for places in patterns]
    if None in found:
        missing = [place for places, there in zip(patterns, found, strict=True) if there is None for place in places]
        looked = ", ".join(path for place in missing for path in folders.expand(place))
        text = f"{name} is not in {Location(root)}, which has none of: {looked}"
        advice = f", and --split {split} names the list" if split else ""
        raise ValueError(f"{text}; --root is the folder in which these lie{advice}")
    photographs, labels = _by_stem(found[0], PICTURES), _labels(found[1], layout.holds)
    stems = _listed(found[2]) if layout.listed else photographs.keys() | labels.keys()
    photographs, labels = ({s: place for s, place in each.items() if s in stems} for each in (photographs, labels))
    if not photographs.keys() & labels.keys():
        listed = f" that {found[2]} names" if layout.listed else ""
        raise ValueError(f"{name}: no label in {found[1]} has the stem of a photograph in {found[0]}{listed}")
    return DataSet(name, split, split == usual, layout.holds, *found[:2], frozenset(stems), photographs, labels)


def stem_of(name: str) -> str:
    """The name of a file without folder and ending."""
    return posixpath.splitext(posixpath.basename(name))[0]


def _first(root: str, patterns: Iterable[str]) -> Location | None:
    """The first place that exists, a file where its name has an ending and else a folder."""
    for path in (path for pattern in patterns for path in folders.expand(pattern)):
        wanted = "file" if path.endswith((".json", ".txt")) else "folder"
        if folders.kind(place := join(root, path)) == wanted:
            return place
    return None


def _labels(place: Location, holds: str) -> dict[str, str]:
    if holds == "masks":
        return _by_stem(place, PICTURES)
    if folders.kind(place) == "folder":
        return _by_stem(place, {".xml"})
    return {stem_of(name): label for name, label in boxes.instances(place).items()}


def _orientation(place: str | None) -> int:
    try:
        return images.orientation(storage.patiently(_head)(place)) if place else 1
    except OSError as error:
        raise storage.fetch_error(error, place) from error


def _head(place: str) -> bytes:
    filesystem, path = storage.resolve(place)
    with filesystem.open_input_file(path) as file:
        return file.read(HEAD_BYTES)


def _by_stem(folder: Location, suffixes: Iterable[str]) -> dict[str, str]:
    """Where each file with one of these endings is, by its stem; the first by name where several have one."""
    found = {}
    for name in folders.walk(folder, LeftOut()):
        if posixpath.splitext(name)[1].lower() in suffixes:
            found.setdefault(stem_of(name), join(folder, name))
    return found


def _listed(place: Location) -> set[str]:
    """The stems in a list: the first words of its lines, but for those that VOC's list of a class marks with -1."""
    lines = storage.read_bytes(place, max_bytes=boxes.MOST_BYTES).decode("utf-8-sig", "replace").splitlines()
    return {stem_of(words[0]) for line in lines if (words := line.split()) and words[1:] != ["-1"]}
