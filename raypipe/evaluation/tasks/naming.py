"""Names in free text against the classes of a ground truth (zero-guidance segmentation, ICCV 2023, 4.2 and supplement).

Each segment becomes one of the classes: the one whose name is most like its own (text to text, Sentence-BERT), and the
one whose name is most like what CLIP makes of the segment (segment to text, of the stored embeddings). What is less
alike than a threshold is discarded. `_naming_scores` scores that.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from raypipe import classes
from raypipe.classes import Classes
from raypipe.evaluation.sums import Sums
from raypipe.evaluation.task import Chart, Task, Value
from raypipe.evaluation.tasks import _alike
from raypipe.evaluation.tasks._classes import OfClasses
from raypipe.evaluation.tasks._naming_scores import GROUND, Overlaps, overlaps, scores
from raypipe.evaluation.tasks._naming_tables import EDGES, KINDS, THRESHOLDS, charts, frequent, histogram

TABLE = {"tt": [i / 10 for i in range(11)], "st": [i / 20 for i in range(8)]}  # thresholds of tables 6 and 7
ALIKE = 0.5  # texts of this cosine and more mean the same (the paper's study of people)
CLIP_WEIGHT = 2.5  # of CLIPScore (Hessel et al., EMNLP 2021)
NO_CLIP = "none"
WHOLE = "pascal_context"  # how data sets begin whose labels are meant to have no gaps: what is of no class there counts
PER_THRESHOLD = ("union", "best", "recall", "area", "precision", "accepted")
OF_OVERLAP = ("truth_recall", "truth_area", "segment_recall", "segment_area")  # with another measure than the IoU
OF_REGIONS = ("name_similarity", "name_alike", "clip_score", "reference_score", "top1_tt", "top1_st")
NEEDS_EMBEDDINGS = ("clip_score", "reference_score")
UNNAMED = ("on_unlabelled", *(f"discarded_{kind}" for kind in KINDS))  # segments whose names are counted
SAME = ("accepted", "recall", "precision")  # of both variants
NUMBERS, COUNTS = pa.list_(pa.float64()), pa.list_(pa.int64())


def _columns(kind: str) -> tuple[tuple[str, pa.DataType], ...]:
    lists = ((f"{name}_at_{kind}", COUNTS if name == "accepted" else NUMBERS) for name in PER_THRESHOLD)
    return (
        *lists,
        *((f"{name}_{kind}", NUMBERS) for name in ("curve", "precision_curve", "classes")),
        *((f"{name}_{kind}", pa.float64()) for name in OF_OVERLAP),
    )


@dataclass(frozen=True)
class Naming(OfClasses, Task):
    """How well segments named in free text meet the classes of a data set, or of labels of one's own with --classes.

    iou_tt takes each segment's name, iou_st its embedding (label --keep-embeddings), and looks for the nearest class.
    Values are means over images of means over classes, those of the label and of the segments. A wrong name is no
    fault on ground that no class has, as in VOC; in PASCAL Context it is. A segment without embedding whose name is one
    of the classes, as methods with classes give it, is of that class in both.
    """

    # that compares names: a folder, or a Hugging Face id
    sentence_model: str = "sentence-transformers/all-mpnet-base-v2"
    clip: str = "openai/clip-vit-large-patch14-336"  # that the run's embeddings are of; none = no iou_st of embeddings
    tau_sbert: float = 0.5  # names less alike than this are none of the classes
    tau_clip: float = 0.1  # the same of segments and classes
    tau_iou: float = 0.5  # a class is found by a segment of this IoU and more
    readable_names: bool = False  # compare with `potted plant`, where the data set writes pottedplant

    COLUMNS = (
        ("iou_tt", pa.float64()),  # null for an image without class in its label and among its segments
        ("iou_st", pa.float64()),  # also null without embeddings
        *(column for kind in KINDS for column in _columns(kind)),
        ("segments", pa.int64()),
        ("without_embedding", pa.int64()),  # segments for whose embedding there is no substitute
        ("pixels", pa.int64()),
        ("unlabelled_pixels", pa.int64()),
        ("on_unlabelled", pa.int64()),  # segments of which more than half lies there
        ("regions", pa.int64()),  # classes in the label
        ("given_regions", pa.int64()),  # of them, those whose pixels are exactly a segment's
        ("similarities", COUNTS),  # of given regions and their classes, by EDGES
        *((name, pa.float64()) for name in OF_REGIONS),  # sums over given regions
        *((f"names_{what}", pa.string()) for what in UNNAMED),  # JSON lists
    )
    QUIET = tuple(name for name, _ in COLUMNS[2:])  # who lacks iou_tt or iou_st lacks them too
    LEAVES = ("size", "counts", "area", "label", "embedding")
    SHOWN = {
        "iou_tt": Value("IoU, text to text", "names and classes by Sentence-BERT", tie="iou_st"),
        "iou_st": Value("IoU, segment to text", "embeddings and classes by CLIP", tie="iou_tt"),
        "iou_tt_best": Value("IoU of the most similar segment, text to text"),
        "iou_st_best": Value("IoU of the most similar segment, segment to text"),
        "recall_tt": Value("Recall, text to text", "classes with a segment of tau_iou and more"),
        "recall_st": Value("Recall, segment to text"),
        "recall_area_tt": Value("Area under recall over IoU, text to text"),
        "recall_area_st": Value("Area under recall over IoU, segment to text"),
        "precision_tt": Value("Precision, text to text", "accepted segments with tau_iou and more"),
        "precision_st": Value("Precision, segment to text"),
        "discarded_tt": Value("Discarded segments, text to text", "share of all", better="low"),
        "discarded_st": Value("Discarded segments, segment to text", "share of all", better="low"),
        "unlabelled": Value("Ground without a class", "share of all pixels", better="low"),
        "on_unlabelled": Value("Segments mostly on ground without a class", "share of all", better="low"),
        "name_similarity": Value("Name and true class", "cosine by Sentence-BERT, of given regions"),
        "name_alike": Value("Names that mean their class", "cosine of 0.5 and more, share of given regions"),
        "clip_score": Value("Region and its name", "cosine by CLIP, of given regions"),
        "reference_score": Value("Region, name and class", "RefCLIPScore, of given regions"),
        "top1_tt": Value("Nearest class is true, text to text", "share of given regions"),
        "top1_st": Value("Nearest class is true, segment to text", "share of given regions"),
    }
    DETAILS = (
        *((f"thresholds_{kind}", NUMBERS) for kind in KINDS),
        *(column for kind in KINDS for column in _columns(kind)),
        *((f"without_accepted_{kind}", COUNTS) for kind in KINDS),  # images that leave the mean of the precision
        ("class_names", pa.list_(pa.string())),
        ("regions", pa.int64()),
        ("given_regions", pa.int64()),
        ("similarities", COUNTS),  # null unless all regions are given
        ("why_no_st", pa.string()),  # why there is no iou_st; null where there is one
    )
    METRIC = "iou_tt"
    PER_IMAGE = ("iou_tt", "iou_st")

    def __post_init__(self):
        """Raise ValueError for a threshold that nothing or everything is above."""
        for name, least in (("tau_sbert", 0), ("tau_clip", -1), ("tau_iou", 0)):
            if not least <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be from {least} to 1, got {value}")
        for name in ("sentence_model", "clip"):  # workers of a sweep may have another current folder
            if (path := Path(getattr(self, name)).expanduser()).exists():
                object.__setattr__(self, name, str(path.absolute()))
        self._of(None, "")

    @property
    def names(self) -> tuple[str, ...]:
        """What the numbers of a label stand for, from 0."""
        return ("background", *self.known.names)

    def options(self) -> dict:
        """The classes too."""
        return super().options() | {"label_classes": self._known and (self._known.source or list(self._known.names))}

    def of_classes(self, text: str | None, dataset: str = "") -> Naming:
        """A task of these classes; it keeps those that it has. Raises ValueError where there are none."""
        task = copy.copy(self)
        task._of(self.known if text is None else classes.read(text), dataset)
        return task

    def load(self) -> None:
        """Have both networks here and what they make of the classes.

        Once in a process; in another one than this, at its first image. Raises ValueError, FileNotFoundError.
        """
        self._compared([])
        if self.clip != NO_CLIP:
            try:
                _alike.of_classes(self.clip, self._texts)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error}; or add --clip none, without iou_st of embeddings") from error

    def ahead(self, rows: list[dict]) -> list[dict]:
        """The same rows; their names have been compared with the classes, all at once."""
        self._compared([each["label"] or "" for row in rows for each in row["segments"] or ()])
        return rows

    def measure(self, row: dict, label: np.ndarray) -> dict:
        """COLUMNS of one image. Raises ValueError for a mask without a name, and an embedding of another CLIP."""
        segments = row["segments"]
        if any(each["label"] is None for each in segments):
            text = "a mask without a name; this task is for methods that name their masks"
            raise ValueError(f"naming: {row.get('key')}: {text}; add --task saliency for the object whatever it is")
        found = overlaps(segments, label)
        vectors = [_alike.unit(each.get("embedding")) for each in segments]
        own = [self.known.numbers.get(classes.normalised(each["label"]), 0) for each in segments]
        own = [number if vector is None else 0 for number, vector in zip(own, vectors, strict=True)]
        is_blind = self.clip == NO_CLIP
        lacking = sum((is_blind or vectors[i] is None) and not number for i, number in enumerate(own))
        measured = self._ground(found, segments) | {"without_embedding": lacking}
        similar = {"tt": self._compared([each["label"] for each in segments])}
        if not lacking:
            similar["st"] = self._similar(vectors, row)
        for i, number in enumerate(own):
            if number:  # it is of that class, however the data set writes it
                for each in similar.values():
                    each[i] = self._order == number
        for kind, similarity in similar.items():
            measured |= self._scored(kind, found, similarity, segments)
        return measured | self._of_given(found, similar, vectors, segments)

    def summary(self, sums: Sums) -> dict[str, float | None]:
        """Means over the images, shares of all segments and pixels, and means over given regions."""
        found = {name: sums.mean(name) for name in ("iou_tt", "iou_st")}
        for kind in KINDS:
            at = self._thresholds(kind).index(self._tau(kind))
            columns = {"best": f"iou_{kind}_best", "recall": f"recall_{kind}", "area": f"recall_area_{kind}"}
            for column, name in (columns | {"precision": f"precision_{kind}"}).items():
                means = sums.mean(f"{column}_at_{kind}")
                found[name] = means and means[at]
            accepted = sums.total(f"accepted_at_{kind}")
            share = _ratio(accepted and accepted[at], sums.total("segments"))
            found[f"discarded_{kind}"] = None if share is None else 1 - share
        found["unlabelled"] = _ratio(sums.total("unlabelled_pixels"), sums.total("pixels"))
        found["on_unlabelled"] = _ratio(sums.total("on_unlabelled"), sums.total("segments"))
        regions = sums.total("regions") if self._are_given(sums) else None
        found |= {name: _ratio(sums.total(name), regions) for name in OF_REGIONS}
        unknown = () if self._similarities(sums) else NEEDS_EMBEDDINGS
        unknown += () if self._why_no_st(sums) is None else tuple(name for name in found if "st" in name.split("_"))
        return found | dict.fromkeys(unknown)

    def details(self, sums: Sums) -> dict:
        """All thresholds, recall and precision over IoU, classes, and similarities of given regions."""
        why, found = self._why_no_st(sums), dict.fromkeys(dict(self.DETAILS))
        for kind in KINDS if why is None else ("tt",):
            found |= {name: sums.mean(name) for name, _ in _columns(kind)}
            found[f"thresholds_{kind}"] = self._thresholds(kind)
            if found[f"accepted_at_{kind}"] is not None:
                found[f"accepted_at_{kind}"] = [int(count) for count in sums.total(f"accepted_at_{kind}")]
            if found[f"precision_at_{kind}"] is not None:
                found[f"without_accepted_{kind}"] = [sums.images - n for n in sums.count(f"precision_at_{kind}")]
        found |= {"class_names": self._known and list(self.known.names), "why_no_st": why}
        found |= {name: int(sums.total(name) or 0) for name in ("regions", "given_regions")}
        return found | {"similarities": self._similarities(sums)}

    def lines(self, details: Mapping, printed: Sequence[Mapping] = ()) -> tuple[list[str], list[tuple[str, list]]]:
        """A line per threshold, with what papers print for it; the headline's is marked."""
        lines = []
        for row in self._at_each(details, printed):
            if row["variant"] == "union":
                mark = " *" if row["is_headline"] else ""
                cells = [row[name] for name in ("value", "published", "best", "accepted", "recall", "precision")]
                lines.append((f"{row['metric'].replace('_', ' ')} at {row['threshold']:.2f}{mark}", cells))
        return ["iou", "published", "best segment", "accepted", "recall", "precision"], lines

    def remarks(self, details: Mapping, printed: Sequence[Mapping] = ()) -> list[str]:
        """What the mark is, why there is no IoU_st, and what the published values stand on."""
        found = ["* marks the threshold of the values above (--tau-sbert, --tau-clip)"]
        if details["why_no_st"]:
            found.append(f"no iou_st: {details['why_no_st']}")
        are_given = details["regions"] and details["regions"] == details["given_regions"]
        if not are_given:
            found.append("values of given regions are those of a run with --regions given:DIR, of these labels")
        if printed:
            parts = ", of parts that DINO finds" if are_given else ""
            found.append(f"published values are of names by --naming zerocap{parts}")
        if printed and not self._is_open:
            found.append("the authors' code scores the first 1,000 images of PASCAL Context at most")
        if printed and self.sentence_model != type(self).sentence_model:
            text = f"published values of iou_tt are with {type(self).sentence_model}, ours with {self.sentence_model}"
            found.append(f"{text}: a threshold for one means little for the other")
        return found

    def tables(self, images: pa.Table, details: Mapping, printed: Sequence[Mapping] = ()) -> dict[str, pa.Table]:
        """thresholds: a row for each metric, variant and threshold. names: those of segments without a class.

        similarities: the histogram of given regions, where there are any.
        """
        rows = [{name: row[name] for name in THRESHOLDS.names} for row in self._at_each(details, printed)]
        found = {"thresholds": pa.Table.from_pylist(rows, schema=THRESHOLDS), "names": frequent(images, UNNAMED)}
        return found | ({"similarities": histogram(counts)} if (counts := details["similarities"]) else {})

    def charts(self, details: Mapping, printed: Sequence[Mapping] = ()) -> list[Chart]:
        """IoU over thresholds (figures 11, 12), recall and precision over IoU, similarities of given regions (13)."""
        return charts(self._at_each(details, printed), details)

    def outline(self, row: dict, label: np.ndarray) -> np.ndarray:
        """What is of a class, whichever it is."""
        return label > 0

    def _of(self, known: Classes | None, dataset: str) -> None:
        """Set the classes, in the order of their names, and how the data set is counted."""
        names = list(known.names) if known else []
        aliases = classes.facts(known.source)["aliases"] if known and known.source else {}
        forms = [[name, *(other for other, its in aliases.items() if its == name)] for name in names]
        forms = [sorted(each, key=lambda form: sum(not sign.isalpha() for sign in form)) for each in forms]
        texts = [each[-1].replace("_", " ") if self.readable_names else each[0] for each in forms]
        if self.readable_names and names and texts == [each[0] for each in forms]:
            raise ValueError("--readable-names has no effect: the names of these classes have no other form")
        order = sorted(range(len(texts)), key=texts.__getitem__)
        is_open = not (dataset or (known.source if known else "")).startswith(WHOLE)
        more = {"_known": known, "_order": np.array(order, int) + 1, "_texts": tuple(texts[i] for i in order)}
        for name, value in (more | {"_is_open": is_open}).items():
            object.__setattr__(self, name, value)

    def _compared(self, names: Sequence[str]) -> np.ndarray:
        """Cosines of names and classes: float64 (n, C)."""
        self.known  # noqa: B018 - raises where nobody said the classes
        return _alike.names(self.sentence_model, self._texts)(names)

    def _similar(self, vectors: Sequence[np.ndarray | None], row: dict) -> np.ndarray:
        """Cosines of segments and classes: float64 (S, C); 0 for a segment without a vector."""
        found = np.zeros((len(vectors), len(self._order)))
        if all(vector is None for vector in vectors):
            return found
        known = _alike.of_classes(self.clip, self._texts)
        for i, vector in enumerate(vectors):
            if vector is not None and len(vector) != known.shape[1]:
                text = f"an embedding of {len(vector)} numbers, but those of --clip {self.clip} have {known.shape[1]}"
                raise ValueError(f"naming: {row.get('key')}: {text}; name the CLIP that the run was made with")
            found[i] = 0 if vector is None else known @ vector
        return found

    def _tau(self, kind: str) -> float:
        return {"tt": self.tau_sbert, "st": self.tau_clip}[kind]

    def _thresholds(self, kind: str) -> list[float]:
        """Those of the paper's table and the headline's own."""
        return sorted({*TABLE[kind], self._tau(kind)})

    def _ground(self, found: Overlaps, segments: Sequence[dict]) -> dict:
        """How much of an image has no class, and the segments that lie there."""
        shared = found.shared
        outside = shared[:, : GROUND + 1].sum(1) > shared.sum(1) / 2
        names = [each["label"] for each, is_there in zip(segments, outside, strict=True) if is_there]
        counts = {"pixels": found.truth.sum(), "unlabelled_pixels": found.truth[: GROUND + 1].sum()}
        counts = {name: int(count) for name, count in counts.items()} | {"segments": len(segments)}
        return counts | {"on_unlabelled": int(outside.sum()), "names_on_unlabelled": _listed(names)}

    def _scored(self, kind: str, found: Overlaps, similarity: np.ndarray, segments: Sequence[dict]) -> dict:
        """The columns of one kind of assignment."""
        thresholds = self._thresholds(kind)
        at = thresholds.index(self._tau(kind))
        areas = np.array([each["area"] for each in segments], np.float64)
        how = {"at": at, "tau_iou": self.tau_iou, "open_ground": self._is_open}
        its = scores(found, similarity, self._order, areas, np.array(thresholds), **how)
        below = similarity.max(1) < thresholds[at]
        names = [each["label"] for each, is_below in zip(segments, below, strict=True) if is_below]
        columns = {f"{name}_at": getattr(its, name) for name in PER_THRESHOLD}
        columns |= dict(zip(OF_OVERLAP, (*its.of_truth, *its.of_segment), strict=True))
        columns |= {"curve": its.curve, "precision_curve": its.precise}
        columns |= {"classes": [its.classes.get(number) for number in range(1, len(self._order) + 1)]}
        measured = {f"{name}_{kind}": value for name, value in columns.items()}
        return measured | {f"iou_{kind}": its.union[at], f"names_discarded_{kind}": _listed(names)}

    def _of_given(
        self, found: Overlaps, similar: Mapping[str, np.ndarray], vectors: Sequence, segments: Sequence[dict]
    ) -> dict:
        """How regions are named that are exactly the ground truth's; only their number where some are not."""
        shared, truth = found.shared, found.truth
        is_region = (shared == truth) & (shared == shared.sum(1, keepdims=True)) & (truth > 0)
        is_region = is_region[:, GROUND + 1 :]  # (S, G)
        counts = {"regions": len(found.present), "given_regions": int(is_region.any(0).sum())}
        if not counts["regions"] == counts["given_regions"]:
            return counts
        which = is_region.argmax(0) if len(segments) else np.zeros(0, int)  # (G,) the segment of each class
        column = np.argsort(self._order)[found.present - 1]
        text = similar["tt"][which, column]
        sums = {"name_similarity": text, "name_alike": text >= ALIKE}
        for kind, similarity in similar.items():
            sums[f"top1_{kind}"] = similarity[which].argmax(1) == column
        if "st" in similar and not any(vectors[i] is None for i in which):
            clip = _alike.clip_scores(self.clip, [segments[i]["label"] for i in which], [vectors[i] for i in which])
            one, other = CLIP_WEIGHT * clip.clip(0), text.clip(0)
            sums |= {"clip_score": clip, "reference_score": 2 * one * other / np.maximum(one + other, 1e-12)}
            bins = np.searchsorted(EDGES, similar["st"][which, column], side="right")
            counts["similarities"] = np.bincount(bins, minlength=len(EDGES) + 1)
        return counts | {name: float(each.sum()) for name, each in sums.items()}

    def _are_given(self, sums: Sums) -> bool:
        """Whether every region of the ground truth is a segment: the run was made of it (`--regions given:DIR`)."""
        return sums.total("regions") == sums.total("given_regions") and bool(sums.total("regions"))

    def _similarities(self, sums: Sums) -> list[int] | None:
        """How many given regions have which similarity to their class, by EDGES; None unless all have one."""
        counts = [int(count) for count in sums.total("similarities") or ()]
        is_known = counts and self._are_given(sums) and sum(counts) == sums.total("regions")
        return counts if is_known and self._why_no_st(sums) is None else None

    def _why_no_st(self, sums: Sums) -> str | None:
        if count := sums.total("without_embedding"):
            if self.clip == NO_CLIP:
                return "--clip none"
            text = f"{int(count):,} segments have no embedding, and a name that is none of the classes"
            return f"{text}; label with --keep-embeddings, by a method that has them"
        return None

    def _at_each(self, details: Mapping, printed: Sequence[Mapping]) -> list[dict]:
        """Rows of THRESHOLDS; those of the union also with the value of the best segment."""
        known = {(each["metric"], *(each["at"] or {}).values()): each["value"] for each in printed}
        rows, counts = [], details["similarities"]
        for kind in KINDS:
            columns = [details[f"{name}_at_{kind}"] for name in ("union", "best", *SAME)]
            columns += [details[f"{name}_{kind}"] for name in ("without_accepted", "thresholds")]
            for union, best, *same, threshold in zip(*columns, strict=True) if None not in columns else ():
                row = {"metric": f"iou_{kind}", "threshold": threshold, "is_headline": threshold == self._tau(kind)}
                row |= dict(zip((*SAME, "without_accepted"), same, strict=True))
                place = np.flatnonzero(EDGES == threshold) if counts and kind == "st" else ()
                below = sum(counts[: place[0] + 1]) / sum(counts) if len(place) else None
                value = {"value": union, "best": best, "published": known.get((f"iou_{kind}", threshold))}
                rows.append(row | value | {"variant": "union", "regions_below": below})
                rows.append(row | {"variant": "best", "value": best, "published": None, "regions_below": below})
        return rows


def _listed(names: Sequence[str]) -> str:
    return json.dumps(names, ensure_ascii=False)


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


TASK = Naming
