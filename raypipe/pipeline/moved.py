"""Images that a run labelled at another place: their folder was moved, renamed, copied or is mounted elsewhere now.

An image's id is the hash of its absolute location, so after a move all of them seem to be new. That they are not shows
in their keys and contents. Then the job is refused, unless it says where they were: with that, they get the ids that
they had, now and in every later start.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shlex
from collections import Counter
from collections.abc import Callable
from functools import partial
from operator import itemgetter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe.inputs.folders import WILDCARD
from raypipe.inputs.items import hashed
from raypipe.inputs.manifest import fetch
from raypipe.run import Ids, Run
from raypipe.run.attempts import newest_by_input
from raypipe.runtime.progress import count_of_images
from raypipe.storage import Location, Spool, map_ahead, normalise

log = logging.getLogger("raypipe")
COMPARED = 24  # images whose bytes are read and compared
PARTS = 256  # of a run's parts that are looked into,
MOST_ROWS = 2_000_000  # and about their rows
TAILS = ("(?s)(?P<tail>.*)", "(?P<tail>[^/]*/[^/]*)$", "(?P<tail>[^/]*)$")  # of a key: all, two names, one


def as_before(images: Spool | pa.Table, source: str, old: str) -> Spool:
    """A listing whose images have the ids that they had while what is at `source` now was at `old`.

    images: rows of schema.MANIFEST. source: what they were listed from. Images that do not lie below it keep theirs.
    """
    base, old = _base(source, images), normalise(old).rstrip("/")
    if base != normalise(source).rstrip("/"):
        old = _before_wildcard(old)

    def moved(rows: pa.Table) -> pa.Table:
        places = map(_place, rows.select(["location", "uri"]).to_pylist())
        ids = [hashed(old + place.removeprefix(base) if place.startswith(base) else place).hex() for place in places]
        return rows.set_column(rows.schema.get_field_index("image_id"), "image_id", pa.array(ids, pa.string()))

    return Spool.of(images.schema, (moved(pa.table(batch)) for batch in images.to_batches()))


def refuse_moved(run: Run, images: Spool | pa.Table, source: str, old: str | None, *, max_bytes: int) -> None:
    """Raise ValueError when new images are the same as some that the run has from another place; warn if few are.

    images: rows of schema.MANIFEST, by the ids of `as_before` where old, the place that the user says they were at, is
    not None; then raise also when they are not those that were labelled there. Compares the bytes of a few images.
    """
    commits = run.commits()
    known = Ids(commits.to_batches())
    is_done = known.among(images)
    new, done = images.filter(pc.invert(is_done)), images.filter(is_done)
    if old is None and (len(known) == len(done) or not len(new)):
        return  # as mostly: all that the run has is in the input
    del known
    is_listed = Ids(images.to_batches()).among(commits)
    if len(new) and len(others := commits.filter(pc.invert(is_listed))):
        same, compared = _doubles(_rows(run, others), new, max_bytes)
        base = _base(source, images)
        if same:
            key, uri, share = (
                same[0][1]["key"],
                same[0][0]["uri"],
                f"{len(same)} of {count_of_images(compared)} compared",
            )
            inside = uri.startswith((f"{base}/", f"{normalise(old).rstrip('/')}/" if old else f"{base}/"))
            # Where the input is known, or they were renamed within it, no other option would put that right.
            if len(done) or 2 * len(same) < compared or inside:
                text = "%s: in the run already under another name, now with a second row: %s is %s there"
                log.warning(text, share, key, uri)
            else:
                where = f"{Location(source)} holds images that {run} has already: {key} is {uri} there, byte for byte"
                advice = f"if they were moved or are reached another way, {_way(run, same, base)}"
                raise ValueError(f"{where} ({share}); {advice}; to label them once more, choose another --output")
    if old is not None:
        _refuse_others(run, commits.filter(is_listed), done, source, old, max_bytes)


def _refuse_others(run: Run, commits: Spool, done: Spool | pa.Table, source: str, old: str, max_bytes: int) -> None:
    """Raise ValueError when what is at `source` is not what was labelled at `old`. commits: of the images in `done`."""
    what = f"--moved-from {Location(old)}"
    if not len(done):
        raise ValueError(f"{what}: no image of {Location(source)} was labelled at its place there")
    rows = _rows(run, commits)
    same, compared = _compare(_sample(rows, done, itemgetter("image_id")), max_bytes)
    other = f"{compared - len(same)} of {count_of_images(compared)} compared"
    if 2 * len(same) < compared:
        advice = "leave the option out to label all as new ones"
        raise ValueError(f"{what}: {other} are not those that were labelled there; {advice}")
    if len(same) < compared:
        log.warning("%s: changed since the run labelled them, and their rows stay", other)


def _doubles(rows: pa.Table, new: Spool | pa.Table, max_bytes: int) -> tuple[list[tuple[dict, dict]], int]:
    """Pairs (row, new image) with the same bytes, and of how many of the same name the bytes were compared."""
    namesakes = []
    for tail in TAILS:
        pairs = _sample(rows, new, partial(_tail, tail))
        namesakes += pairs if tail == TAILS[0] else []
        same, compared = _compare(pairs, max_bytes)
        if same:
            return same, compared
    if namesakes:
        text = "the run has images of the same names with other contents, such as %s: these are labelled as new ones"
        log.warning(text, namesakes[0][0]["uri"])
    return [], 0


def _way(run: Run, same: list[tuple[dict, dict]], base: str) -> str:
    """The options that give the images the ids of their rows."""
    before = [each.values["moved_from"] for each in newest_by_input(run) if each.values.get("moved_from")]
    ways = Counter()
    for row, image in same:
        place, uri = _place(image), row["uri"]
        equal = os.path.commonprefix([place[::-1], uri[::-1]])[::-1]
        for root in dict.fromkeys([base, place.removesuffix(equal[equal.find("/") :])]):
            rest = place.removeprefix(root)
            for old in dict.fromkeys([uri.removesuffix(rest), *before]):
                if hashed(old + rest).hex() == row["image_id"]:
                    ways[root, old] += 1
    if not ways:
        return "say with --moved-from where they were"
    (root, old), _ = max(ways.items(), key=lambda way: (way[0][0] == base, way[1]))
    return f"add --moved-from {shlex.quote(old)}" + ("" if root == base else f" and --input {shlex.quote(root)}")


def _rows(run: Run, commits: Spool) -> pa.Table:
    """image_id, uri, key, sha256 of committed rows; of very many, those of parts all over the run and all over them."""
    names = list(dict.fromkeys(name for each in commits.to_batches() for name in pc.unique(each["part"]).to_pylist()))
    names, ids = names[:: -(-len(names) // PARTS)], Ids(commits.to_batches())

    def read(name: str) -> pa.Table:
        with run.part(name) as part:
            rows = part.read(columns=["image_id", "uri", "key", "sha256"])
        rows = rows.filter(ids.among(rows)).replace_schema_metadata()
        return rows.take(np.arange(0, len(rows), -(-len(rows) * len(names) // MOST_ROWS) or 1))

    return pa.concat_tables(map_ahead(read, names))


def _tail(pattern: str, rows: pa.Table | pa.RecordBatch) -> pa.Array | pa.ChunkedArray:
    return pc.struct_field(pc.extract_regex(rows["key"], pattern), "tail")


def _sample(rows: pa.Table, images: Spool | pa.Table, name: Callable) -> list[tuple[dict, dict]]:
    """Up to 24 pairs (row, image), from all over. name(rows): of each row or image, alike in a pair; of several images
    the first one counts."""
    rows = rows.filter(pc.not_equal(rows["sha256"], ""))  # "": it could not be read then
    there, start = name(rows), 0
    names = pc.unique(there)
    first = np.full(len(names), -1)  # image of each name
    for batch in images.to_batches():
        found = pc.index_in(name(batch), value_set=names)
        its, places = np.unique(found.drop_null().to_numpy(), return_index=True)
        places = start + np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))[places]
        first[its] = np.where(first[its] < 0, places, first[its])
        start += len(batch)
    image = first[pc.index_in(there, value_set=names).to_numpy()]
    known = np.flatnonzero(image >= 0)
    chosen = known[:: max(1, -(-len(known) // COMPARED))]
    return list(zip(rows.take(chosen).to_pylist(), images.take(image[chosen].tolist()).to_pylist(), strict=True))


def _compare(pairs: list[tuple[dict, dict]], max_bytes: int) -> tuple[list[tuple[dict, dict]], int]:
    """The pairs whose image has the very bytes that were labelled, and of how many pairs the image could be read."""
    contents = list(fetch([image for _, image in pairs], max_bytes=max_bytes))
    read = [(pair, content) for pair, content in zip(pairs, contents, strict=True) if isinstance(content, bytes)]
    return [pair for pair, content in read if hashlib.sha256(content).hexdigest() == pair[0]["sha256"]], len(read)


def _place(image: dict) -> str:
    """The text whose hash is an image's id where nothing was moved."""
    location, uri = image["location"], image["uri"]
    return uri if uri == location else normalise(location) + uri.removeprefix(Location(location))


def _base(source: str, images: Spool | pa.Table) -> str:
    """Where all images of an input lie: the folder or file itself, of a glob what is before its wildcards, of a list
    or table of locations the folder that they have in common."""
    whole, place = normalise(source).rstrip("/"), _place(images.take([0]).to_pylist()[0])
    for base in (whole, _before_wildcard(whole)):
        if place == base or place.startswith((f"{base}/", f"{base}#")):
            return base
    ends = (pc.min_max(batch["uri"]).as_py().values() for batch in images.to_batches() if len(batch))
    return os.path.commonprefix(list(itertools.chain.from_iterable(ends))).rpartition("/")[0]


def _before_wildcard(place: str) -> str:
    wildcard = WILDCARD.search(place)
    return place[: wildcard.start()].rpartition("/")[0] if wildcard else place
