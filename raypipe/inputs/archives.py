"""Archives: for each category of a list its best images of a corpus. What `raypipe archive` writes, and others read.

    <archive>/archive.json       the classes in label order and the settings; written last: without it, no archive
    <archive>/archive.parquet    MEMBERS, by category in label order, then by rank
    <archive>/manifest.parquet   schema.MANIFEST: each image once, however many categories it serves, by the ids that it
                                 has in the corpus, so that runs over the corpus and over the archive join

An archive is an input like any other: its images are labelled once each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256

import pyarrow as pa
import pyarrow.compute as pc

from raypipe import schema, storage
from raypipe.classes import Category, Classes
from raypipe.inputs.addresses import Addresses
from raypipe.inputs.items import Unusable, manifest_of
from raypipe.storage import Folder, Location, open_table, parquet_bytes
from raypipe.types import BadImage

ARCHIVE = "archive.json"
MEMBERS_FILE, MANIFEST_FILE = "archive.parquet", "manifest.parquet"
MEMBERS = pa.schema(
    [
        ("category", pa.string()),  # its name; its label in a map is its place in the classes, from 1
        ("rank", pa.int32()),  # 0 = the best
        ("image_id", pa.string()),
        ("key", pa.string()),
        ("uri", pa.string()),
        ("score", pa.float32()),  # cosine of the category's text and the image; null when it is not known
    ]
)
MAX_BYTES = 1 << 32  # of a published archive file


@dataclass(frozen=True)
class Archive:
    """An archive as it was read. The same image may serve several categories."""

    place: Location
    classes: Classes
    members: pa.Table  # MEMBERS
    images: pa.Table  # schema.MANIFEST: each image once, in the order of the members

    def of(self, category: str) -> pa.Table:
        """The images of a category, best first: rows of schema.MANIFEST. Empty when it has none."""
        ids = self.members.filter(pc.equal(self.members["category"], category))["image_id"]
        return self.images.take(pc.index_in(ids, value_set=self.images["image_id"].combine_chunks()))


def read(place: str, *, image_root: str | None = None) -> Archive:
    """Read the folder of `raypipe archive`, or a file {category: [paths]} as the authors of NamedMask publish (.json).

    image_root: where the relative paths of such a file start; None = beside it. Its classes are in its own order:
    labels are bound by name. Raises FileNotFoundError or ValueError, which say what was expected.
    """
    location = Location(place)
    if location.lower().endswith(".json"):
        return _published(location, image_root)
    if image_root is not None:
        raise ValueError(f"image root {image_root!r} has no effect: {location} is a folder, which knows its images")
    folder = Folder(place)
    settings = _settings(folder)
    if settings is None:
        raise FileNotFoundError(f"{location}: no {ARCHIVE} there, so it is no archive; make one with raypipe archive")
    classes = Classes(settings.get("source", ""), tuple(Category(**each) for each in settings["classes"]))
    members, images = _table(folder, MEMBERS_FILE, MEMBERS), _images(folder)
    if unknown := set(members["category"].to_pylist()) - set(classes.names):
        raise ValueError(f"{location}: damaged: {sorted(unknown)[0]!r} is none of its classes")
    if pc.any(pc.invert(pc.is_in(members["image_id"], value_set=images["image_id"].combine_chunks()))).as_py():
        raise ValueError(f"{location}: damaged: an image of {MEMBERS_FILE} is not in {MANIFEST_FILE}")
    if _settings(folder) != settings:
        raise ValueError(f"{location}: the archive was made anew while it was read; try again")
    return Archive(location, classes, members, images)


def images(source: Location, *, allow_private: bool = False) -> pa.Table | None:
    """The distinct images of an archive's folder as rows of schema.MANIFEST; None when the source is no such folder.

    allow_private: web addresses among them may lead into a private network, as those of any table may only then.
    Raises ValueError when the archive is damaged or not finished, and OSError.
    """
    parts = storage.split(source)
    if source.lower().endswith((".json", ".parquet", ".tar")) or (parts and parts.is_web):
        return None
    try:
        folder = Folder(source.uri)
        if _settings(folder) is None:
            if _has_embeddings(folder):  # else the tables there would be taken for an input
                raise ValueError(f"{folder}: its archive is not finished; run raypipe archive again")
            return None
        found = _images(folder)
    except (NotADirectoryError, FileNotFoundError):
        return None
    return found if allow_private else _public(found)


def write(
    folder: Folder, settings: dict, members: pa.Table, images: pa.Table, others: Mapping[str, pa.Table | bytes]
) -> None:
    """Write an archive into a folder: its old settings go first and the new come last, so readers never see a mixture.

    settings: with `source` and `classes` (a list of {name, query} in label order). others: more files of it by name.
    """
    tables = {MEMBERS_FILE: members.cast(MEMBERS), MANIFEST_FILE: _with_locations(images, _without_secrets)} | others
    folder.delete(ARCHIVE)
    digests = {}
    for name, table in tables.items():
        content = table if isinstance(table, bytes) else parquet_bytes(table)
        folder.write(content, name)
        digests[name] = sha256(content).hexdigest()
    folder.write_json(settings | {"files": digests}, ARCHIVE)


def is_whole(folder: Folder, settings: Mapping) -> bool:
    """Whether all files of an archive are as they were written. settings: what its `archive.json` says."""
    files = settings["files"].items()
    return all((content := folder.read(name)) and sha256(content).hexdigest() == digest for name, digest in files)


def _settings(folder: Folder) -> dict | None:
    try:
        found = folder.read_json(ARCHIVE)
    except ValueError as error:
        raise ValueError(f"{folder}: damaged: its {ARCHIVE} cannot be read ({error})") from error
    is_ours = isinstance(found, dict) and isinstance(found.get("classes"), list)
    return found if is_ours else None


def _has_embeddings(folder: Folder) -> bool:
    """Whether `raypipe archive` has begun in a folder."""
    try:
        found = folder.read_json("run.json")
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("table") in set(schema.TABLES) - {"masks"}


def _table(folder: Folder, name: str, columns: pa.Schema) -> pa.Table:
    try:
        with folder.open(name) as file:
            return open_table(file).read(columns=columns.names).cast(columns)
    except FileNotFoundError:
        raise ValueError(f"{folder}: damaged: its {name} is gone; run raypipe archive again") from None
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: damaged: its {name} cannot be read ({error})") from error


def _images(folder: Folder) -> pa.Table:
    """The manifest; locations on the archive's own store take over its credentials and endpoint."""
    stored = _table(folder, MANIFEST_FILE, schema.MANIFEST)
    return _with_locations(stored, lambda uri: storage.locate(folder.uri, uri).uri)


def _public(images: pa.Table) -> pa.Table:
    """The same, but web addresses lead to public ones alone."""
    pairs = zip(images["public"].to_pylist(), images["location"].to_pylist(), strict=True)
    is_public = [is_public or _is_web(uri) for is_public, uri in pairs]
    return images.set_column(schema.MANIFEST.get_field_index("public"), "public", pa.array(is_public, pa.bool_()))


def _is_web(uri: str) -> bool:
    return (parts := storage.split(uri)) is not None and parts.is_web


def _without_secrets(uri: str) -> str:
    """A location as it may stand in a file: of a web address the query stays, for it may say which image is meant."""
    return storage.normalise(uri) if _is_web(uri) else storage.without_secrets(uri)


def _with_locations(images: pa.Table, change: Callable[[str], str]) -> pa.Table:
    locations = [change(uri) for uri in images["location"].to_pylist()]
    i = schema.MANIFEST.get_field_index("location")
    return images.cast(schema.MANIFEST).set_column(i, "location", pa.array(locations, pa.string()))


def _published(location: Location, image_root: str | None) -> Archive:
    """A file {category: [paths]}; the rank is the place in the list."""
    try:
        found = json.loads(storage.read_bytes(location, max_bytes=MAX_BYTES))
    except BadImage as error:
        raise (FileNotFoundError if error.kind == "missing" else ValueError)(error.message) from error
    except ValueError as error:
        raise ValueError(f"{location}: expected JSON of a category's paths by its name ({error})") from error
    if not isinstance(found, dict) or not found or not all(map(_are_paths, found.values())):
        raise ValueError(f"{location}: expected {{category: [paths]}} with a category at least")
    addresses = Addresses(storage.join(image_root, "archive.json") if image_root else location)
    entries = [(category, rank, path) for category, paths in found.items() for rank, path in enumerate(paths)]
    try:
        items = [addresses.item(path) for _, _, path in entries]
    except Unusable as error:
        text = str(error).replace("record{s}", "a path").partition(":")[0]
        raise ValueError(f"{location}: {text}; copy the images, or list them by paths beside the file") from None
    images = manifest_of(iter(items))[0].read()
    places = {location: i for i, location in enumerate(images["location"].to_pylist())}
    chosen = images.take(pa.array([places[item.location.uri] for item in items], pa.int64()))
    categories, ranks, _ = zip(*entries, strict=True) if entries else ((), (), ())
    columns = [pa.array(categories, pa.string()), pa.array(ranks, pa.int32())]
    columns += [chosen[name] for name in ("image_id", "key", "uri")] + [pa.nulls(len(entries), pa.float32())]
    classes = Classes("", tuple(Category(name, name) for name in found))
    return Archive(location, classes, pa.table(columns, schema=MEMBERS), images)


def _are_paths(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(path, str) and path for path in value)
