"""The rows of a run for those who come after the job: the one place that opens parts, and each image once.

An id may be committed twice, by a retry or a compaction that was killed. Which row counts is settled here, by
`superseded`, for every reader.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

from raypipe import schema
from raypipe.conditions import Condition
from raypipe.lookup import one_line
from raypipe.run.ids import Ids, superseded
from raypipe.run.run import DamagedRun, Run
from raypipe.storage import Location, Spool, map_ahead, open_table, resolve
from raypipe.types import BadImage

BATCH_ROWS = 250  # images handed on at once; an image of a hundred masks may take a megabyte
LARGE_ROWS = 16  # the same with soft masks, of which one may take ten, or with embeddings
SMALL = tuple(field.name for field in schema.SEGMENT if field.name not in schema.LARGE)
PARTS_AHEAD = 4  # parts read at the same time
# What a condition can name, besides the columns of a joined table.
IMAGE_COLUMNS = "image_id uri key sha256 height width note seconds attempt error method segments".split()
CELLS = "area score label bbox stability".split()
SEGMENT_COLUMNS = ["segment", "share", *CELLS]
# One row per segment with its image's columns, and one with nulls per image without segment; `row` counts the images.
FLAT = f"""WITH cells AS (
    SELECT *, unnest(if(len(segments) > 0, segments, [NULL])) AS cell,
    unnest(if(len(segments) > 0, range(len(segments)), [NULL])) AS segment FROM stored
), one_batch AS (
    SELECT row, segment, {", ".join(IMAGE_COLUMNS[:-1])}, coalesce(len(segments), 0) AS segments,
    cell.area / (height::DOUBLE * width) AS share, {", ".join(f"cell.{name}" for name in CELLS)} FROM cells
)"""


def load(run: Run, names: Sequence[str] | None = None, *, embeddings: bool = False) -> pa.Table:
    """All committed rows, each id once, with the column `method`. names: read only these columns.

    Of any table of schema.TABLES: masks or embeddings. embeddings: segments have theirs too, null where none was kept.

    Raises FileNotFoundError when the folder is no run and ValueError for an unknown column.
    """
    known = [*run.columns.names, "method"]
    if unknown := set(names or ()) - set(known):
        raise ValueError(f"unknown column {sorted(unknown)[0]!r}; choose from: {', '.join(known)}")
    kept = [field for field in run.columns if names is None or field.name in names]
    kept = pa.schema(kept, metadata=run.columns.metadata)
    if embeddings and "segments" not in kept.names:
        raise ValueError(f"embeddings=True has no effect: they are in the column segments, not in {kept.names}")
    leaves = [*SMALL, "soft", *["embedding"] * embeddings]
    kept, paths = schema.with_leaves(kept, leaves), _paths(leaves, kept.names)
    # Again where a job that retries errors, or `compact`, has replaced a part since it was listed.
    for attempt in Retrying(retry=retry_if_exception_type(FileNotFoundError), stop=stop_after_attempt(3), reraise=True):
        with attempt:
            stored = (table.cast(kept) for table in columns(run, paths))  # parts of several versions
            table = pa.concat_tables([kept.empty_table(), *stored])
    table = table.append_column("method", pa.array([run.method] * len(table), pa.string()))
    return table if names is None else table.select(names)


def columns(run: Run, names: Sequence[str]) -> Iterator[pa.Table]:
    """Some stored columns of all committed rows, a table per part, in the order of the parts, each id once.

    names: columns, or paths of fields such as `segments.list.element.area`: what is not named stays on the disk.
    """
    if not {name.partition(".")[0] for name in names} <= set(run.columns.names):
        refuse_other_than_masks(run)
    lost = _lost(run)

    def read(name: str) -> pa.Table:
        with run.part(name) as part:
            table = _without(part.read(columns=["image_id", *names], use_threads=False), lost[name])
        return table if "image_id" in names else table.drop_columns("image_id")

    return map_ahead(read, lost, depth=PARTS_AHEAD)


def batches(run: Run, *, leaves: tuple[str, ...] = SMALL) -> Iterator[pa.Table]:
    """Committed rows in the order of the parts, each id once, with `method`: up to 250 at a time, of LARGE fields 16.

    leaves: read of each segment only these fields; null where the version of raypipe that stored it had none. Safe
    while a job writes.
    """
    refuse_other_than_masks(run)
    lost, count = _lost(run), LARGE_ROWS if {*leaves} & {*schema.LARGE} else BATCH_ROWS
    for name in lost:
        with run.part(name) as part:
            for batch in part.iter_batches(count, columns=_paths(leaves)):
                table = _without(_with(pa.table(batch), leaves), lost[name])
                yield table.append_column("method", pa.repeat(pa.scalar(run.method), len(table)))


def take(run: Run, ids: Sequence[str], *, leaves: tuple[str, ...] = SMALL) -> list[dict]:
    """The rows of some images, in the order of their ids in `ids`; ids without a row are left out.

    leaves: as in `batches`. Reads only the parts and row groups that hold them.
    """
    commits = complete_commits(run)
    lost, wanted, where = superseded(commits), pa.array(ids, pa.string()), defaultdict(list)
    for batch in commits.to_batches():
        for row in batch.filter(pc.is_in(batch["image_id"], value_set=wanted)).to_pylist():
            if (row["image_id"], row["part"]) not in lost:
                where[row["part"]].append(row["image_id"])
    rows = {}
    for name, its in where.items():
        with run.part(name) as part:
            for group in range(part.num_row_groups):
                stored = part.read_row_group(group, columns=["image_id"])["image_id"]
                here = pc.is_in(stored, value_set=pa.array(its, pa.string()))
                if pc.any(here).as_py():  # else only its ids are read
                    matching = _with(part.read_row_group(group, columns=_paths(leaves)), leaves).filter(here)
                    rows |= {row["image_id"]: row for row in matching.to_pylist()}
    return [rows[image_id] for image_id in ids if image_id in rows]


def refuse_other_than_masks(run: Run) -> None:
    """Raise ValueError for a run whose rows are not masks."""
    if run.table != "masks":
        raise ValueError(f"{run} holds {run.table.replace('_', ' ')}, not masks: give a run of raypipe label")


def complete_commits(run: Run) -> Spool:
    """`Run.commits`, but raises DamagedRun also when a finished run has fewer images than it ended with.

    A run that repair took damaged parts from is not finished: what is left of it can be read.
    """
    images = (run.completed() or {}).get("images", 0)  # first: a job at work adds to the commits
    commits = run.commits()
    if images and (count := len(Ids(commits.to_batches()))) < images:
        raise DamagedRun(run, f"{images - count:,} of {images:,} images have no row any more")
    return commits


def good_rows(run: Run) -> dict[str, tuple[Location, int]]:
    """By key, where each image's row without error lies: the part's location, and the index of the row in it."""
    refuse_other_than_masks(run)
    good, lost = {}, _lost(run)
    for name in lost:
        with run.part(name) as part:
            table = part.read(columns=["image_id", "key", "error"])
        for i, row in enumerate(table.to_pylist()):
            if not row["error"] and row["image_id"] not in lost[name]:
                good[row["key"]] = (run.folder.location(run.data, name), i)
    return good


def segments_of(location: str, index: int) -> list[dict]:
    """The segments of one row of a part, as `good_rows` tells where it is. Raises BadImage when the part is gone."""
    return _segments(location)[index].as_py()


def select(
    run: Run, *, where: str | None = None, joined: Sequence[pa.Table] = (), leaves: tuple[str, ...] = SMALL
) -> Iterator[dict]:
    """The images that match a condition, as rows of `schema.MASKS` with the column `method`.

    where: an SQL condition (DuckDB) over one row per segment with the image's columns: IMAGE_COLUMNS (`segments` is the
    image's number of them), `segment` (index from 0), `area`, `share` (area / (height * width)), `score`, `label`,
    `bbox`. An image without segment is one row in which those are null. A row's `segments` holds those that match, each
    with its index as `segment`. None takes every image with all segments. joined: see `read_joined`. leaves: of
    segments, as in `batches`.
    Of a column of lists whose name begins with `mask_` a segment has the value at its index.
    Memory is bounded by 250 rows and, for 16 bytes or so an image, by the commit records.
    Raises ValueError at once for a condition that does not work, and FileNotFoundError when the folder is no run.
    """
    condition = None if where is None else OverSegments(where, joined)
    return (row for batch in batches(run, leaves=leaves) for row in _chosen(batch, condition))


def run_names(uris: tuple[str, ...]) -> list[str]:
    """A short name for each run: as many last parts of its path as tell it from the others.

    Raises ValueError for a run that is named twice.
    """
    paths = [Location(uri).rstrip("/").split("/") for uri in uris]
    if len({tuple(path) for path in paths}) < len(paths):
        raise ValueError(f"the same run is named twice: {', '.join(map(Location, uris))}")
    names = (["/".join(path[-length:]) for path in paths] for length in itertools.count(1))
    return next(each for each in names if len(set(each)) == len(each))


class OverSegments(Condition):
    """An SQL condition over FLAT, checked when it is made."""

    def __init__(self, where: str, joined: Sequence[pa.Table] = ()):
        """where, joined: as in `select`. Raises ValueError with DuckDB's message and the columns there are."""
        tables, own = "one_batch", []
        columns = [*IMAGE_COLUMNS, *SEGMENT_COLUMNS]
        super().__init__(where, columns)
        for i, table in enumerate(joined):
            key = _key(table)
            table = table.select([name for name in table.column_names if name == key or name not in columns])
            columns += [name for name in table.column_names if name != key]  # the list that errors show
            of_masks = [each.name for each in table.schema if each.name[:5] == "mask_" and pa.types.is_list(each.type)]
            own += [f'"{name}"[segment + 1] AS "{name}"' for name in of_masks]
            self.database.register(f"joined_{i}", table)
            tables += f" LEFT JOIN joined_{i} USING ({key})"
        shown = f"* REPLACE ({', '.join(own)})" if own else "*"
        self._query = f"{FLAT}, known AS (SELECT {shown} FROM {tables}) SELECT row, segment FROM known"
        self._query += f" WHERE (\n{where}\n)"  # on its own line: it may end with a comment
        self.matches(schema.MASKS.empty_table().append_column("method", pa.array([], pa.string())))

    def matches(self, table: pa.Table) -> dict[int, list[int]]:
        """What matches in rows of `batches`: index of the image -> indices of its segments, both ascending.

        Raises ValueError for a value that the condition cannot take, such as text as a number.
        """
        table = _with(table, CELLS)  # DuckDB knows no tables with numbers of 16 bits
        self.database.register("stored", table.append_column("row", pa.array(range(len(table)), pa.int64())))
        with self.explained():
            pairs = self.database.execute(f"{self._query} ORDER BY row, segment").fetchall()
        self.database.unregister("stored")
        chosen: dict[int, list[int]] = {}
        for row, segment in pairs:
            chosen.setdefault(row, []).extend([] if segment is None else [segment])
        return chosen


def read_joined(uri: str) -> pa.Table:
    """A Parquet table with one row per image, whose columns a condition can use, such as an agreement or metrics.

    uri: a file with the column `key` or, if it has none, `image_id`; columns that the rows have themselves are not
    used. Raises FileNotFoundError or ValueError.
    """
    location, (filesystem, path) = Location(uri), resolve(uri)
    try:
        with filesystem.open_input_file(path) as file:
            table = open_table(file).read()
    except FileNotFoundError:
        raise FileNotFoundError(f"--join {location} does not exist; give a Parquet table, a row per image") from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"--join {location} is no Parquet table: {error}") from None
    if _key(table) is None:
        raise ValueError(f"--join {location}: expected a column key or image_id, got {', '.join(table.schema.names)}")
    if len(pc.unique(table[_key(table)])) < len(table):
        raise ValueError(f"--join {location}: expected one row per image, but some {_key(table)} stands there twice")
    return table


def _key(joined: pa.Table) -> str | None:
    return next((name for name in ("key", "image_id") if name in joined.column_names), None)


def _chosen(table: pa.Table, condition: OverSegments | None) -> Iterator[dict]:
    chosen = condition.matches(table) if condition else dict.fromkeys(range(len(table)))
    for row, kept in zip(table.take(pa.array(chosen, pa.int64())).to_pylist(), chosen.values(), strict=True):
        segments = [segment | {"segment": i} for i, segment in enumerate(row["segments"] or [])]
        yield row | {"segments": segments if kept is None else [segments[i] for i in kept]}


def _paths(leaves: Sequence[str], names: Sequence[str] = schema.MASKS.names) -> list[str]:
    """The stored columns to read: all of `schema.MASKS` or those named, of the segments only `leaves`.

    `area` too: with none that its version has, a part would not tell how many there are.
    """
    of_segments = [f"segments.list.element.{leaf}" for leaf in dict.fromkeys(("area", *leaves))]
    return [path for name in names for path in (of_segments if name == "segments" else [name])]


def _with(table: pa.Table, leaves: Sequence[str]) -> pa.Table:
    """The segments with these fields, and null where they have none: the version of their part had not."""
    wanted = pa.list_(pa.struct([field for field in schema.SEGMENT if field.name in leaves]))
    return table.set_column(table.schema.get_field_index("segments"), "segments", table["segments"].cast(wanted))


def _lost(run: Run) -> dict[str, list[str]]:
    """By part, oldest first, the ids whose row in it does not count.

    Both from one listing: were the parts listed again, one that came in between would show images a second time.
    """
    commits = complete_commits(run)
    names = {name for each in commits.to_batches() for name in pc.unique(each["part"]).to_pylist()}
    lost = {name: [] for name in sorted(names)}
    for image_id, part in superseded(commits):
        lost[part].append(image_id)
    return lost


def _without(table: pa.Table, lost: list[str]) -> pa.Table:
    return table.filter(pc.invert(pc.is_in(table["image_id"], value_set=pa.array(lost)))) if lost else table


@lru_cache(maxsize=1)
def _segments(location: str) -> pa.ChunkedArray:
    """The segments of a part. Neighbours in an input mostly lie in one part, so the last one is kept."""
    filesystem, path = resolve(location)
    try:
        with filesystem.open_input_file(path) as file:
            paths = [f"segments.list.element.{leaf}" for leaf in ("size", "counts")]
            return open_table(file, checked=True).read(columns=paths)["segments"]
    except (OSError, pa.ArrowException) as error:
        run = Location(location).rpartition("/masks/")[0]
        text = f"{Location(location)} cannot be read ({one_line(error)}); is it damaged? raypipe verify {run}"
        raise BadImage("foreground", "io", text) from error
