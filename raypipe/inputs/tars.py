"""The pictures in WebDataset tars."""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial

from raypipe import formats, storage
from raypipe.inputs.folders import why_left_out
from raypipe.inputs.items import PICTURES, Item, unlisted
from raypipe.storage import map_ahead
from raypipe.types import BadImage

TAR_BUFFER = 1 << 15  # bytes: the headers of small neighbours come with one request, large pictures are jumped over
# What tells a member's ending from its sample's name: 7.seg.png, but not 10.30.png
ENDING = re.compile(r"(\.[a-z][\w-]*)+$", re.IGNORECASE)
# Words in the endings of pictures that say something about another one: 7.seg.png beside 7.jpg
LABELS = set(
    "seg segmentation semantic instance instances panoptic mask masks label labels gt annotation annotations matte "
    "alpha trimap depth normal normals edge edges thumb thumbnail".split()
)
READ = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".mpo")
Place = tuple[str, int, int]  # a member's name as stored, where its bytes begin, how many they are


def list_tars(files: list[tuple[str, str]], ending: str | None, skipped: Counter) -> Iterator[Item]:
    """The pictures in tars, given as (location, relative name); `skipped` counts the other members.

    Only headers are read. Of members that differ in nothing but their endings, a sample, labels beside a picture are
    left out (7.seg.png beside 7.jpg). ending: which to take instead, such as `jpg` or `jpg;input.png`. Links stand for
    what they link to in the same tar. Raises ValueError when the only file is no tar, or when most samples of a tar
    hold several pictures and none is evident, or no member has the ending; OSError when one cannot be read.
    """
    endings = {each.strip().lower().removeprefix(".") for each in ending.split(";")} if ending else None
    read, none = partial(_pictures, endings=endings), True
    for (_, name), (items, left_out) in zip(files, map_ahead(read, files), strict=True):
        if len(files) == 1 and len(items) == 1 and items[0].length is None:
            raise ValueError(f"{name} is not a readable tar: {_what_it_is(files[0][0], items[0].start)}")
        skipped.update(left_out)
        none = none and not items
        yield from items
    if endings and none:
        there = ", ".join(f"{number:,} {reason}" for reason, number in skipped.most_common(9) if reason.startswith("."))
        raise ValueError(f"--column {ending!r}: no member of a tar ends so; the endings are {there}")


def _what_it_is(location: str, start: int) -> str:
    """What there is instead of a tar, or where one is damaged."""
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file:
        head = file.read(1024)
    try:
        kind = "tar" if start else formats.identify(head)[0]
    except BadImage as error:
        return error.message
    packed = {"gzip": "it is compressed; unpack it first", "archive": "it is compressed; unpack it first"}
    return packed.get(kind, f"it is damaged from byte {start} on" if kind == "tar" else f"it holds {kind}")


def _pictures(file: tuple[str, str], *, endings: set[str] | None) -> tuple[list[Item], Counter]:
    """The pictures of a tar by its headers, and what was left out. Damage ends the list with an `unlisted` row."""
    (location, name), skipped = file, Counter()
    members, damaged = _members(location, skipped)
    reasons = {member: _why_left_out(member, endings) for member in members}
    if endings is None:
        reasons |= _labels([member for member, reason in reasons.items() if not reason], name)
    stem, items = posixpath.splitext(storage.as_text(name))[0], []
    for member, reason in reasons.items():
        place = None if reason else _target(members, member)
        if place is None:
            skipped[reason or f"link{{s}} to nothing in the tar, {member!r}"] += 1
        else:
            part = storage.as_text(place[0])
            items.append(Item(location, f"{stem}/{part}", f"#{part}", *place[1:]))
    if damaged is not None:
        items.append(unlisted(location, name, damaged))
    return items, +skipped


def _members(location: str, skipped: Counter) -> tuple[dict[str, Place | str], int | None]:
    """Files by their path in the tar, each with its place, or with the path that it, a symbolic link, leads to.

    Also the byte from which on the tar is damaged, if it is. The last member of a name counts, as when unpacking.
    """
    found: dict[str, Place | str] = {}
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file, io.BufferedReader(file, TAR_BUFFER) as stream:
        archive, is_another = None, True
        try:
            while is_another:
                archive = tarfile.TarFile(fileobj=stream)
                for member in archive:
                    archive.members = []  # it would keep them all
                    name, place = _path(member.name), _place(member, found)
                    if place is not None:
                        skipped["member{s} replaced by a later one of the same name"] += name in found
                        found[name] = place
                    elif not member.isdir():
                        skipped["sparse file{s}" if member.issparse() else "special file{s}"] += 1
                stream.seek(archive.offset)
                is_end, is_another = _end(stream)
                if not is_end:  # tarfile takes a broken header for it
                    return found, archive.offset
        except (tarfile.TarError, ValueError, EOFError, OSError) as error:
            damaged = archive.offset if archive else 0
            if isinstance(error, OSError) and damaged <= file.size():  # not a jump behind the end: no damage
                raise
            return found, damaged
    return found, None


def _end(stream: io.BufferedReader) -> tuple[bool, bool]:
    """Whether zeros end a tar here, two blocks of them or all that is left; and whether another tar stands behind them.

    The stream is then at its beginning.
    """
    count, block = 0, stream.read(tarfile.BLOCKSIZE)
    while block == bytes(tarfile.BLOCKSIZE):
        count, block = count + 1, stream.read(tarfile.BLOCKSIZE)
    is_another = block[257:262] == b"ustar"
    stream.seek(-len(block), io.SEEK_CUR)
    return count > 1 or (count == 1 and (is_another or not block.strip(b"\0"))), is_another


def _place(member: tarfile.TarInfo, found: dict[str, Place | str]) -> Place | str | None:
    """Where the bytes of a member are, or the path that it leads to; None where it has none that lie together."""
    if member.islnk():  # to what bears the name now: a later member of that name is another file
        target = found.get(_path(member.linkname), "")
        return target if isinstance(target, str) else (member.name, *target[1:])
    if member.issym():
        return posixpath.normpath(posixpath.join(posixpath.dirname(_path(member.name)), member.linkname))
    return (member.name, member.offset_data, member.size) if member.isreg() and not member.issparse() else None


def _path(name: str) -> str:
    """A member's path as it lies when unpacked: without a root, `.` or `..`."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def _target(members: dict[str, Place | str], name: str) -> Place | None:
    """The place of a member, of a symbolic link that of its target; None where that is not in the tar."""
    place, passed = members[name], set()
    while isinstance(place, str):
        if place in passed or place not in members:
            return None
        passed.add(place)
        place = members[place]
    return (name, *place[1:]) if passed else place


def _why_left_out(name: str, endings: set[str] | None) -> str:
    """Why a member is left out by its name; "" for a picture."""
    *folders, base = name.split("/")
    reason = next(filter(None, (why_left_out(folder, is_folder=True) for folder in folders)), why_left_out(base))
    if reason:
        return reason
    if endings is None:
        suffix = posixpath.splitext(base)[1].lower()
        return "" if suffix in PICTURES else suffix or "member{s} without extension"
    return "" if _ending(name)[1:] in endings else _ending(name) or "member{s} without extension"


def _ending(name: str) -> str:
    match = ENDING.search(posixpath.basename(name))
    return match[0].lower() if match else ""


def _labels(pictures: list[str], tar: str) -> dict[str, str]:
    """Pictures that belong to another one of their sample, and why they are left out. Raises ValueError."""
    samples: dict[str, list[str]] = {}
    for name in pictures:
        samples.setdefault(name[: len(name) - len(_ending(name))], []).append(name)
    labels, several, found = {}, 0, Counter()
    for members in samples.values():
        others = [name for name in members if LABELS.isdisjoint(re.split(r"[\W\d_]+", _ending(name)))] or members
        labels |= {name: f"{_ending(name)} (beside a picture)" for name in set(members).difference(others)}
        read = [_ending(name) for name in others if name.lower().endswith(READ)]
        if len(read) > 1:
            several += 1
            found.update(read)
    common = [ending for ending, number in found.items() if number > max(several / 2, ending.count(".") - 1)]
    if several > len(samples) / 2 and len(common) > 1:  # not Felis.catus.jpg, Felis.silvestris.jpg
        shown = ", ".join(f"{found[ending]:,} {ending}" for ending in common)
        text = f"most samples in {tar} hold several pictures: {shown}; choose such as --column {common[0][1:]}"
        raise ValueError(text)
    return labels
