"""Data sets by name: where their photographs and labels lie beneath a root, as people unpack them, and their splits."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from raypipe import classes, images, lookup, storage
from raypipe.evaluation import classmaps
from raypipe.evaluation.task import Task
from raypipe.evaluation.tasks import boxes
from raypipe.inputs import folders
from raypipe.inputs.items import PICTURES, LeftOut
from raypipe.inputs.maskfiles import Matches
from raypipe.storage import Location, join

# what data sets with such labels are for, unless told otherwise
TASKS = {"masks": "saliency", "boxes": "boxes", "classes": "semantic"}
UNPAIRED = 10  # photographs without a label, or the reverse, that are named
HEAD_BYTES = 1 << 20  # of a photograph, in which its orientation is looked for


class Layout(NamedTuple):
    """Places beneath the root, of each the first that exists; braces stand for several names, as in shells."""

    images: tuple[str, ...]  # folders of photographs
    labels: tuple[str, ...]  # folders of masks or of VOC's annotations, or COCO's one file
    listed: tuple[str, ...] = ()  # files with a photograph's name per line; none = all photographs
    split: str | None = None  # which of several such files, unless told otherwise; it is the one of the papers
    holds: Literal["masks", "boxes", "classes"] = "masks"
    form: str = "indices"  # of label maps (`classmaps.FORMS`)
    ends: tuple[str, str] = ("", "")  # how the stems of photographs and of labels end, before which they are equal
    depth: int = 1  # parts of a path that tell photographs apart: 2 = the folder too
    names: tuple[str, ...] = ()  # files of lines `number: name`: of all numbers in label maps, and of the classes alone
    other: Layout | None = None  # where else the data set may lie, in another form


def _duts(part: str) -> tuple[str, str]:
    return tuple(f"{{DUTS/DUTS-{part},DUTS,DUTS-{part}}}/DUTS-{part}-{what}" for what in ("Image", "Mask"))


def _voc(year: int) -> Layout:
    root = f"{{VOC{year}/,}}VOCdevkit/VOC{year}"
    split = f"{root}/ImageSets/Main/{{split}}.txt"
    return Layout((f"{root}/JPEGImages",), (f"{root}/Annotations",), (split,), "trainval", "boxes")


def _imagenet_s(count: int) -> Layout:
    name = f"ImageNetS{count}/"
    root = f"{{{name},imagenet-s/{name},ImageNet-S/{name},}}"
    photographs, labels = (f"{root}{{split}}{what}" for what in ("", "-segmentation"))
    return Layout((photographs,), (labels,), split="validation", holds="classes", form="packed")


VOC2012 = "{VOC2012/VOCdevkit/VOC2012/,VOCdevkit/VOC2012/,VOC2012/,}"
VOC2010 = VOC2012.replace("2012", "2010")  # whose photographs PASCAL Context labels
CONTEXT = "{PascalContext/,pascal_context/,PASCAL-Context/,}"  # as zero-guidance segmentation's code has it
OF_SPLIT = (f"{CONTEXT}{{split}}/segment_anno", f"{CONTEXT}segment_anno")
IN_459 = Layout((f"{CONTEXT}{{split}}/images",), OF_SPLIT, (), "val", "classes", names=(f"{CONTEXT}labels.txt",))
UNKNOWN = ("background", "unknown")  # names in such a file that are no class
COCO2017 = "{COCO/,coco/,coco2017/,}"
CITYSCAPES = "{cityscapes/,Cityscapes/,}"
COCA = "{CoCA/,}"
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
    "voc2012": Layout(
        (f"{VOC2012}JPEGImages",),
        (f"{VOC2012}SegmentationClass",),
        (f"{VOC2012}ImageSets/Segmentation/{{split}}.txt",),
        "val",
        "classes",
    ),
    "coco2017": Layout(
        (f"{COCO2017}{{images/,}}{{split}}2017",),
        (f"{COCO2017}annotations/instances_{{split}}2017.json",),
        split="val",
        holds="classes",
    ),
    "coca": Layout((f"{COCA}image",), (f"{COCA}binary",), holds="classes", depth=2),
    "cityscapes_object": Layout(
        (f"{CITYSCAPES}leftImg8bit/{{split}}",),
        (f"{CITYSCAPES}gtFine/{{split}}",),
        split="val",
        holds="classes",
        form="ids",
        ends=("_leftImg8bit", "_gtFine_labelIds"),
    ),
    **{f"imagenet_s{count}": _imagenet_s(count) for count in (50, 300, 919)},
    "pascal_context_59": Layout(
        (f"{VOC2010}JPEGImages",),
        (f"{VOC2010}SegmentationClassContext",),
        (f"{VOC2010}ImageSets/SegmentationContext/{{split}}.txt",),
        "val",
        "classes",
        other=IN_459._replace(names=(*IN_459.names, f"{CONTEXT}labels_59.txt")),
    ),
    "pascal_context_459": IN_459,
}


@dataclass(frozen=True)
class DataSet:
    """A data set, or a split of it, as it lies on a disk. Photographs and labels belong together by their stems."""

    name: str
    split: str | None
    is_usual: bool  # of its splits it is the one that papers report
    layout: Layout
    images: Location  # the folder of its photographs: what `label` and `sweep` take as their input
    labels: Location  # where its labels are: a folder, or COCO's one file
    stems: frozenset[str]  # of all that belongs to it
    photographs: Mapping[str, str]  # stem -> where the photograph is
    location: Mapping[str, str]  # stem -> where the label is
    classes: str = ""  # as `classes.read` takes them; "" = the list that is known by the data set's name
    numbers: Mapping[int, int] = field(default_factory=dict)  # of classes, by what stands for them in label maps

    @property
    def form(self) -> str | Mapping[int, int]:
        """How label maps are stored, as `classmaps.read` takes it."""
        return self.numbers or self.layout.form

    @property
    def holds(self) -> str:
        """What its labels are: masks, boxes or classes."""
        return self.layout.holds

    def stem_of(self, key: str) -> str:
        """What tells its photographs apart of an image's key."""
        return _stem(key, self.layout.ends[0], self.layout.depth) or ""

    def match(self, keys: Iterable[str]) -> Matches:
        """Which label belongs to which image, by stem. keys: those of all images; one may stand twice.

        Of several images with one stem, as where masks lie among them, the one counts that has its photograph's path.
        """
        claimants = defaultdict(list)
        for key in dict.fromkeys(keys):
            claimants[self.stem_of(key)].append(key)
        found = {}
        for stem, place in self.location.items():
            its = claimants.get(stem, ())
            its = its if len(its) < 2 else [key for key in its if self._is_at(stem, key)]
            if len(its) == 1:
                found[its[0]] = place
        unused = [stem for stem in self.location if stem not in claimants]
        if folders.kind(self.labels) == "folder" and self.layout.depth == 1:
            unused = [posixpath.basename(self.location[stem]) for stem in unused]
        return Matches(found, unused)

    def outside(self, keys: Iterable[str]) -> set[str]:
        """The images that are none of the data set's, or of another split of it."""
        return {key for key in keys if self.stem_of(key) not in self.stems}

    def orientation(self, key: str) -> int:
        """How an image's label is to be turned (`images.UPRIGHT`): as its photograph's EXIF says; 1 = not at all.

        The label was made of the photograph as it is stored, unless it is a mask with EXIF of its own, by which it was
        turned when it was read. Raises BadImage when these cannot be read.
        """
        stem = self.stem_of(key)
        found = _orientation(self.photographs.get(stem))
        if found == 1 or self.holds == "boxes":
            return found
        return 1 if _orientation(classmaps.file_of(self.location[stem])) > 1 else found

    def _is_at(self, stem: str, key: str) -> bool:
        return f"/{self.photographs.get(stem, '')}".endswith(f"/{key}")


def names() -> list[str]:
    """All data sets, sorted."""
    return sorted(LAYOUTS)


def task_of(dataset: str | None, has_classes: bool = False) -> str:
    """The task that a data set is for; of labels of one's own `semantic` with classes, else `pattern`."""
    if (name := _spelled(dataset or "")) in LAYOUTS:
        return TASKS[LAYOUTS[name].holds]
    return "semantic" if has_classes else "pattern"


def bound(task: Task, source: str | DataSet, classes: str | None = None) -> Task:
    """A task for labels from there: it knows the classes of a data set, else those that are said (`classes.read`).

    Raises ValueError where a task needs classes that nobody says, or knows none.
    """
    if isinstance(source, DataSet) and source.holds != task.HOLDS:
        return task  # which is refused where labels are matched
    is_named = isinstance(source, DataSet) and source.holds == "classes"
    if is_named and classes is not None:
        raise ValueError(f"--classes has no effect with --dataset {source.name}, which has its own; leave one out")
    return task.of_classes(source.classes or source.name, source.name) if is_named else task.of_classes(classes)


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
    if (name := _spelled(name)) not in LAYOUTS:
        raise ValueError(f"unknown data set {name!r}; {lookup.suggest(name, names())}")
    usual = LAYOUTS[name].split
    if split is not None and usual is None:
        raise ValueError(f"--split {split!r} has no effect: {name} has no splits")
    if folders.kind(root) == "missing":
        raise FileNotFoundError(storage.missing(Location(root)))
    split = split or usual
    layout, found = _laid_out(name, root, split)
    photographs = _by_stem(found[0], PICTURES, layout.ends[0], layout.depth)
    labels = _labels(name, found[1], layout)
    stems = _listed(found[2]) if layout.listed else photographs.keys() | (labels.keys() if not layout.names else set())
    photographs, labels = ({s: place for s, place in each.items() if s in stems} for each in (photographs, labels))
    if not photographs.keys() & labels.keys():
        listed = f" that {found[2]} names" if layout.listed else ""
        raise ValueError(f"{name}: no label in {found[1]} has the stem of a photograph in {found[0]}{listed}")
    if layout.holds == "classes":
        _check_pairs(name, found, stems, photographs, labels)
    known = _numbered(name, found[-len(layout.names) :]) if layout.names else ()
    return DataSet(name, split, split == usual, layout, *found[:2], frozenset(stems), photographs, labels, *known)


def _spelled(name: str) -> str:
    """A data set's name, or what is none; papers write pascal-context-59."""
    return next((each for each in (name, name.replace("-", "_")) if each in LAYOUTS), name)


def _laid_out(name: str, root: str, split: str | None) -> tuple[Layout, list[Location]]:
    """The first layout of a data set that is there, and its places. Raises ValueError that names all it looked for."""
    missing, layout = [], LAYOUTS[name]
    while layout:
        patterns = [layout.images, layout.labels, *filter(None, [layout.listed]), *zip(layout.names, strict=True)]
        patterns = [[each.replace("{split}", split or "") for each in places] for places in patterns]
        found = [_first(root, places) for places in patterns]
        if None not in found:
            return layout, found
        missing += [place for places, there in zip(patterns, found, strict=True) if there is None for place in places]
        layout = layout.other
    looked = ", ".join(path for place in missing for path in folders.expand(place))
    text = f"{name} is not in {Location(root)}, which has none of: {looked}"
    advice = f", and --split {split} names the list" if split else ""
    raise ValueError(f"{text}; --root is the folder in which these lie{advice}")


def _numbered(name: str, files: list[Location]) -> tuple[str, dict[int, int]]:
    """The classes, as `classes.read` takes them, and their numbers by what stands for them in label maps.

    files: of lines `number: name`: all, and those of the classes where not all are. Raises ValueError for other lines,
    and for a class that the list of the data set does not have.
    """
    texts = [storage.read_bytes(file, max_bytes=boxes.MOST_BYTES).decode("utf-8-sig", "replace") for file in files]
    pairs = [[line.partition(":") for line in text.splitlines() if line.strip()] for text in texts]
    for file, its in zip(files, pairs, strict=True):
        if wrong := next(("".join(each) for each in its if not (each[0].strip().isdigit() and each[2].strip())), None):
            raise ValueError(f"{name}: {file}: expected lines such as `2: aeroplane`, got {wrong!r}")
    every = {int(number): classes.normalised(text) for number, _, text in pairs[0]}
    wanted = [each for _, _, text in pairs[-1] if (each := classes.normalised(text)) not in UNKNOWN]
    text = "" if len(files) > 1 else json.dumps(wanted)
    known = classes.read(text or name).numbers
    if unknown := [each for each in wanted if each not in known]:
        raise ValueError(f"{name}: {files[-1]} has the class {unknown[0]!r}; {lookup.suggest(unknown[0], known)}")
    return text, {number: known[each] for number, each in every.items() if each in {*wanted}}


def stem_of(name: str) -> str:
    """The name of a file without folder and ending."""
    return _stem(name, "", 1)


def _stem(name: str, end: str, depth: int) -> str | None:
    """The last parts of a path without what the last one ends with; None where it does not end so.

    In composed Unicode: some systems and archives keep accents as characters of their own.
    """
    stem = "/".join(posixpath.splitext(unicodedata.normalize("NFC", name))[0].split("/")[-depth:])
    return stem.removesuffix(end) if stem.endswith(end) else None


def _check_pairs(name: str, places: list[Location], stems: Collection[str], *pairs: Mapping[str, str]) -> None:
    """Raise ValueError for photographs without a label and the reverse: what a mean speaks of would be another set."""
    for what, there in zip(("photograph", "label"), pairs, strict=True):
        if missing := sorted(stems - there.keys()):
            more = ", ..." if len(missing) > UNPAIRED else ""
            text = f"{len(missing):,} images have no {what}: {', '.join(missing[:UNPAIRED])}{more}"
            raise ValueError(f"{name}: {text}; photographs are in {places[0]}, labels in {places[1]}")


def _first(root: str, patterns: Iterable[str]) -> Location | None:
    """The first place that exists, a file where its name has an ending and else a folder."""
    for path in (path for pattern in patterns for path in folders.expand(pattern)):
        wanted = "file" if path.endswith((".json", ".txt")) else "folder"
        if folders.kind(place := join(root, path)) == wanted:
            return place
    return None


def _labels(name: str, place: Location, layout: Layout) -> dict[str, str]:
    if layout.holds == "boxes" and folders.kind(place) == "folder":
        return _by_stem(place, {".xml"})
    if layout.holds == "boxes":
        return {stem_of(file): label for file, label in boxes.instances(place).items()}
    if folders.kind(place) == "file":
        return {stem_of(file): label for file, label in classmaps.instances(place).items()}
    if layout.depth > 1:
        found = classmaps.of_class_folders(place, name)
        return {_stem(file, "", layout.depth): label for file, label in found.items()}
    return _by_stem(place, PICTURES, layout.ends[1])


def _orientation(place: str | None) -> int:
    try:
        return images.orientation(storage.patiently(_head)(place)) if place else 1
    except OSError as error:
        raise storage.fetch_error(error, place) from error


def _head(place: str) -> bytes:
    filesystem, path = storage.resolve(place)
    with filesystem.open_input_file(path) as file:
        return file.read(HEAD_BYTES)


def _by_stem(folder: Location, suffixes: Iterable[str], end: str = "", depth: int = 1) -> dict[str, str]:
    """Where each file with one of these endings is, by its stem; the first by name where several have one."""
    found = {}
    for name in folders.walk(folder, LeftOut()):
        if posixpath.splitext(name)[1].lower() in suffixes and (stem := _stem(name, end, depth)):
            found.setdefault(stem, join(folder, name))
    return found


def _listed(place: Location) -> set[str]:
    """The stems in a list: the first words of its lines, but for those that VOC's list of a class marks with -1."""
    lines = storage.read_bytes(place, max_bytes=boxes.MOST_BYTES).decode("utf-8-sig", "replace").splitlines()
    return {stem_of(words[0]) for line in lines if (words := line.split()) and words[1:] != ["-1"]}
