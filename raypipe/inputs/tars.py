"""The pictures in WebDataset tars."""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator

from raypipe import storage
from raypipe.inputs.items import PICTURES, Item, unlisted
from raypipe.storage import map_ahead

TAR_BUFFER = 1 << 15  # bytes: the headers of small neighbours come with one request, large pictures are jumped over


def list_tars(files: list[tuple[str, str]], skipped: Counter) -> Iterator[Item]:
    """The pictures in tars, given as (location, relative name); `skipped` counts the other members.

    Only headers are read. Raises ValueError when the only file is no tar, OSError when one cannot be read.
    """
    for (_, name), (items, left_out) in zip(files, map_ahead(_members, files), strict=True):
        if len(files) == 1 and len(items) == 1 and items[0].length is None:
            start = items[0].start
            raise ValueError(f"{name} is not a readable tar: it is damaged from byte {start} on, or compressed")
        skipped.update(left_out)
        yield from items


def _members(file: tuple[str, str]) -> tuple[list[Item], Counter]:
    """The pictures of a tar by its headers, and what was left out. Damage ends the list with an `unlisted` row."""
    (location, name), items, skipped = file, [], Counter()
    stem = posixpath.splitext(storage.as_text(name))[0]
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as file, io.BufferedReader(file, TAR_BUFFER) as stream:
        archive = None
        try:
            archive = tarfile.TarFile(fileobj=stream)
            for member in archive:
                archive.members = []  # it would keep them all
                if reason := _not_a_picture(member):
                    skipped[reason] += 1
                    continue
                part = storage.as_text(member.name)
                items.append(Item(location, f"{stem}/{part}", f"#{part}", member.offset_data, member.size))
            stream.seek(archive.offset)  # tarfile takes a broken header in the middle for the end: is its marker there?
            damaged = archive.offset if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE) else None
        except (tarfile.TarError, ValueError, EOFError, OSError) as error:
            damaged = archive.offset if archive else 0
            if isinstance(error, OSError) and damaged <= file.size():  # not a jump behind the end: no damage
                raise
    if damaged is not None:
        items.append(unlisted(location, name, damaged))
    return items, skipped


def _not_a_picture(member: tarfile.TarInfo) -> str:
    """Why a member is left out; "" for a picture."""
    if not member.isreg() or member.issparse():
        return "members that are no regular files"
    if any(part.startswith((".", "_")) for part in member.name.split("/") if part not in (".", "..")):
        return "hidden names"
    suffix = posixpath.splitext(member.name)[1].lower()
    return "" if suffix in PICTURES else suffix or "members without extension"
