"""Which kind the mask files of a folder have, from their pixels: evident, or asked for."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from raypipe import storage
from raypipe.inputs.maskkinds import HALF, LIGHT, Kind, Stored, stored
from raypipe.storage import map_ahead
from raypipe.types import BadImage

log = logging.getLogger("raypipe")
MOST_FILES = 500  # looked at, evenly spread over a larger folder
FEW = 32  # levels of a file that may be numbers of classes
PALE, DARK = 0.75, 0.25  # of white: where light begins and dark ends
SHEET, NO_SHEET = 0.8, 0.5  # light share of the border from which on there is a white sheet, and up to which none
INK = 0.95  # least dark share of what is opaque on a transparent sheet
PHOTOGRAPH = 0.5  # from this share of pixels between dark and light on it is no mask
EVEN = 0.1  # of white: levels that lie closer than this are one
PARTS = 5  # connected parts per level from which on the many levels are shades: a number has one part or few
FLAT = 0.8  # least share of pixels between black and white that equal their neighbour, in a map of numbers
NEAR, ONE_INK = 24, 0.6  # of 255: how far coloured ink is from its median; least share of it that is not farther
FEW_OF_ANOTHER = 0.1  # files of another kind up to this share are a remark, more an error
STRAY = 0.05  # share of a value's pixels in those of 255 up to which they are noise
VOID = 255  # by custom in an index map: pixels that do not count
OWN_NAME = re.compile(r"(segment|cluster) \d+")  # names that our own label maps give to what has none

WORDS = {  # what a file looks like, for people
    "light": "light on dark",
    "ink": "ink on white",
    "transparent": "ink on transparent",
    "alpha": "alpha cut-outs",
    "index": "numbers of classes",
    "photograph": "pictures with many colours or shades",
}


class Look(NamedTuple):
    """What one file looks like."""

    name: str
    like: str  # one of WORDS; "" where nothing can be said: one level only, or a border that is half light
    shares: dict[str, float]  # of its pixels that each kind sets
    levels: dict[int, int] = {}  # pixels by value, of `index` (the lowest FEW + 1) and of one or two levels
    are_many: bool = False  # an index map of many numbers or of more than 8 bits: they may be identities
    is_opaque: bool = False  # it could be transparent somewhere, but is not
    is_sheet: bool = False  # the higher of two values covers most of its border

    def share(self, kind: Kind) -> float:
        """Of its pixels that are set, read as a kind."""
        levels = sum(self.levels.get(value, 0) for value in kind.values) / max(1, sum(self.levels.values()))
        return self.shares.get(kind.name, levels)


def recognise(
    files: Sequence[tuple[str, str]],
    kind: Kind | None = None,
    *,
    what: str,
    option: str,
    meanings: Mapping[int, str],
    max_bytes: int,
    max_pixels: int,
) -> Kind:
    """The kind of a folder's masks, said in one line. Looks at all files, or at MOST_FILES of them, in threads.

    files: name and location of each. kind: as which they are to be read; None = as they look. what: they are, for
    people ("labels"). option: how a person says the kind. meanings: of values, where our own export tells them. Raises
    ValueError that names files and ways out when they are of several kinds, when no mask sets a pixel, or when it is
    not evident which of several values is meant.
    """

    def look_at(file: tuple[str, str]) -> Look | None:
        try:
            found = stored(storage.read_bytes(file[1], max_bytes=max_bytes), max_pixels=max_pixels)
            return look(file[0], found) if kind is None else Look(file[0], "", {kind.name: kind.mask(found).mean()})
        except BadImage:  # whoever needs it is told
            return None

    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, MOST_FILES).round().astype(int))]
    looks = [each for each in map_ahead(look_at, chosen) if each]
    if not looks:
        return kind or LIGHT
    found, words = (kind, kind.words) if kind else _decide(looks, what, option, meanings)
    count = f"{len(files):,} file{'s' * (len(files) != 1)}"
    count += f" ({len(chosen):,} looked at)" if len(chosen) < len(files) else ""
    log.info("%s: %s, %s", what, words, count)
    shares = [each.share(found) for each in looks]
    if max(shares) == 0:
        raise ValueError(f"no pixel of any of the {what} is set, read as {words}; is another kind meant? {option}")
    if min(shares) == 1:
        log.warning("%s: every pixel of each file is set; is another kind meant? %s", what, option)
    return found


def look(name: str, file: Stored) -> Look:
    """What a mask file looks like."""
    shares = {kind: float(Kind(kind).mask(file).mean()) for kind in ("light", "ink", "nonzero")}
    shares["alpha"] = 1.0 if file.alpha is None else float((file.alpha >= HALF).mean())
    if shares["alpha"] < 1:
        return Look(name, _like_of_alpha(file), shares)
    levels, white = _grey(file)
    values, counts = _histogram(levels)
    if white and np.ptp(values) < EVEN * white and (file.is_lossy or len(values) > FEW):  # one level and its noise
        values, counts = np.array([round(values.mean() / white) * white]), np.array([levels.size])
    like = "" if len(values) == 1 else _like(levels, values, white, file)
    if file.is_palette and (like == "index" or len(values) == 1):
        values, counts = _histogram(file.values)
    told = FEW + 1 if like == "index" else 2 * (len(values) <= 2)
    by_level = dict(zip(values[:told].tolist(), counts[:told].tolist(), strict=True))
    are_many = like == "index" and (len(values) > FEW or white > 255)
    is_sheet = len(values) == 2 and _sheet(file.values == values[1]) == "ink"
    return Look(name, like, shares, by_level, are_many, file.alpha is not None, is_sheet)


def _histogram(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values, ascending, and how many pixels have each."""
    if levels.dtype.kind == "f" or levels.dtype.itemsize > 2:
        return np.unique(levels, return_counts=True)
    counts = np.bincount(levels.ravel())
    values = np.flatnonzero(counts)
    return values, counts[values]


def _grey(file: Stored) -> tuple[np.ndarray, float]:
    """The levels that tell what a file is, and their white; 0 = they are numbers of a palette or of colours."""
    if file.picture.ndim == 2:
        return file.values, file.white
    levels = file.brightest()
    spread = levels - file.darkest()
    is_grey = (spread > 48).mean() < 0.01 if file.is_lossy else not spread.any()
    is_seen = not file.is_palette or np.ptp(levels) > 0
    return (levels, 255) if is_grey and is_seen else (file.values, 0)


def _like_of_alpha(file: Stored) -> str:
    """Whether what is opaque is a drawing on a transparent sheet, which may be empty, or cut out of a picture."""
    opaque = file.alpha >= HALF
    dark, light = file.brightest()[opaque] < DARK * 255, file.darkest()[opaque] > PALE * 255
    return "transparent" if not len(dark) or (dark.any() and (dark | light).mean() >= INK) else "alpha"


def _like(levels: np.ndarray, values: np.ndarray, white: float, file: Stored) -> str:
    """What `Look.like` is. levels: (H, W). values: the different ones, two or more, ascending. white: of them."""
    is_few, spans = len(values) <= FEW, values[0] == 0 and values[-1] == white
    dark = file.darkest() < HALF
    sheet = _sheet(~dark)
    if white == 0:
        if file.is_palette or (is_few and not file.is_lossy and (len(values) > 2 or sheet != "ink")):
            return "index"
        ink = file.picture[dark].astype(int)  # of one colour, else it was cut out of a photograph and laid on white
        is_one = sheet == "ink" and (abs(ink - np.median(ink, 0)) <= NEAR).all(1).mean() >= ONE_INK
        return "ink" if is_one else "photograph"
    if spans and len(values) == 2:
        return sheet
    if white > 1 and not file.is_lossy:
        inner = (levels > 0) & (levels < white)
        alike = (levels[:, 1:] == levels[:, :-1])[inner[:, 1:]]
        may_be_soft = spans and len(values) > 3  # black, white and the edges between
        is_flat = len(alike) and alike.mean() >= FLAT and (is_few or not _are_shades(levels, values))
        if (is_few and not may_be_soft) or is_flat:
            return "index"
    between = (levels >= DARK * white) & (levels <= PALE * white)
    return "photograph" if between.mean() > PHOTOGRAPH else sheet


def _are_shades(levels: np.ndarray, values: np.ndarray) -> bool:
    """Whether levels (H, W) lie about in specks, as in a probability that is nearly 0 or 1 almost everywhere."""
    from skimage.measure import label

    return label(levels, background=-1, connectivity=1).max() >= PARTS * len(values)


def _sheet(light: np.ndarray) -> str:
    """Ink on a white sheet, or light on dark, by the border; "" where that is half and half. light: bool (H, W)."""
    border = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]]).mean()
    return "ink" if border >= SHEET else "light" if border <= NO_SHEET else ""


def _decide(looks: list[Look], what: str, option: str, meanings: Mapping[int, str]) -> tuple[Kind, str]:
    """The kind of all files, and what is said of it."""
    if meanings:
        return _of_export(meanings, looks, what, option)
    by_like: dict[str, list[Look]] = defaultdict(list)
    are_cut_out = any(each.like == "alpha" for each in looks)
    for each in looks:
        by_like["" if are_cut_out and each.is_opaque else each.like].append(each)  # opaque: all of its picture
    unclear = by_like.pop("", [])
    likes = set(by_like)
    if not likes and {value for each in unclear for value in each.levels} <= {0, 255, 65535}:
        return LIGHT, WORDS["light"]
    if not likes:
        return _of_numbers(unclear, what, option)
    if likes <= {"ink", "transparent"}:
        return Kind("ink"), "ink on white or transparent" if len(likes) > 1 else WORDS[likes.pop()]
    if likes <= {"alpha", "transparent"}:
        return Kind("alpha"), WORDS["alpha"]
    if likes == {"index", "light"} and all(each.levels for each in by_like["light"]):
        by_like["index"] += by_like.pop("light")  # files of two levels, 0 and the highest: may be numbers too
    like = max(by_like, key=lambda like: len(by_like[like]))
    if like == "photograph":
        text = f"the {what} look like {WORDS[like]}, such as {by_like[like][0].name!r}; give the folder of masks alone"
        raise ValueError(f"{text}, or say how to read them: {option}")
    if len(by_like) > 1:
        _mixed(by_like, what, option)
    if like == "index":
        return _of_numbers([*by_like[like], *unclear], what, option)
    return Kind("ink" if like == "transparent" else like), WORDS[like]


def _mixed(by_like: dict[str, list[Look]], what: str, option: str) -> None:
    """Say that files are of several kinds: an error, or a remark where one kind is rare."""
    ordered = sorted(by_like.items(), key=lambda pair: -len(pair[1]))
    named = "; ".join(f"{len(found):,} {WORDS[like]}, such as {found[0].name!r}" for like, found in ordered)
    text, counts = f"the {what} are of several kinds: {named}", [len(found) for _, found in ordered]
    if sum(counts[1:]) > FEW_OF_ANOTHER * sum(counts):
        raise ValueError(f"{text}; put them into folders of one kind, or say how to read all: {option}")
    log.warning("%s; all are read as %s, or say how: %s", text, WORDS[ordered[0][0]], option)


def _of_numbers(looks: list[Look], what: str, option: str) -> tuple[Kind, str]:
    """Which numbers of index maps are the object."""
    total = Counter()
    for each in looks:
        total.update(each.levels)
    values, objects = set(total), set(total) - {0}
    if values == {1, 2, 3}:
        return Kind("value", (1,)), "trimaps (1 object, 2 ground, 3 edge)"
    if len(objects) == 2 and VOID in objects and 0 in values:
        return _beside_void(min(objects), total, looks)
    if len(objects) == 1:
        if 2 * sum(each.is_sheet for each in looks) > len(looks):
            text = "most %s are set up to the border, such as %r; is value 0 the object? %s"
            log.warning(text, what, next(each.name for each in looks if each.is_sheet), option)
        return Kind("nonzero"), f"value {_number(objects.pop())}"
    if any(each.are_many for each in looks) and 0 in values:
        return Kind("nonzero"), "identities (any value but 0)"
    pixels = sum(total.values())
    found = ", ".join(f"{_number(value)} {count / pixels:.1%}" for value, count in total.most_common(8))
    more = ", ..." if len(total) > 8 else ""
    raise ValueError(f"the {what} have several values, {found}{more}; which of them is the object? {option}")


def _number(value: int) -> str:
    """A value for people, with its colour where it is one."""
    return f"{value} (#{value:06x})" if value > 0xFFFF else str(value)


def _beside_void(value: int, total: Counter, looks: list[Look]) -> tuple[Kind, str]:
    """The kind of files of the values 0, `value` and 255."""
    if not any(each.levels.get(value) and each.levels.get(VOID) for each in looks):
        return Kind("nonzero"), f"value {value} in some files, {VOID} in others"
    if total[value] < STRAY * total[VOID]:
        return LIGHT, WORDS["light"]
    if abs(value - HALF) <= 8:
        return Kind("value", (VOID,)), f"trimaps ({VOID} object, 0 ground, {value} edge)"
    return Kind("value", (value,)), f"value {value} ({VOID} is void)"


def _of_export(meanings: Mapping[int, str], looks: list[Look], what: str, option: str) -> tuple[Kind, str]:
    """Which value of our own label maps is the object: the first mask that is there, or the only name."""
    objects = {value: name for value, name in meanings.items() if value}
    seen = {value: name for value, name in objects.items() if any(value in each.levels for each in looks)}
    objects = seen or objects
    first = min(objects)
    if len(objects) == 1 or all(OWN_NAME.fullmatch(name) for name in objects.values()):
        return Kind("value", (first,)), f"label maps of raypipe, value {first} ({objects[first]})"
    named = ", ".join(f"{value} {name!r}" for value, name in list(objects.items())[:20])
    raise ValueError(f"the {what} are label maps of raypipe with {named}; which is the object? {option}")
