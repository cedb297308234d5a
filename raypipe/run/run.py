"""A run's folder: which images are pending, who may write, what is committed. Plain functions over files, no Ray.

    <output>/run.json                                 the frozen configuration, with provenance
    <output>/<table>/method=<m>/part-<attempt>-<task>-<hash>.parquet    the table is masks, or another of schema.TABLES
    <output>/_commits/part-<attempt>-<task>-<hash>.parquet   ids and errors of those rows, sealed; written last
    <output>/_runs/<attempt>.json                     one record per attempt; LOCK; the attempt's pending images

A part counts once its commit record exists, so a run may be killed at any moment: what has no record is deleted at the
next start and done again.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from raypipe import schema
from raypipe.lookup import one_line
from raypipe.run.frozen import NewerRun, parsed, refuse_newer, refuse_other, version_of
from raypipe.run.ids import ROWS, Ids, superseded
from raypipe.run.seal import is_sealed, seal
from raypipe.storage import Folder, Locked, Spool, fence, map_ahead, open_table, parquet_bytes, portions
from raypipe.types import RETRYABLE

PENDING_ROWS = 20_000  # images per pending file: enough files for parallel reads, few enough to list
OURS = re.compile(r"part-\d{8}T\d+Z-[0-9a-f]{4}-\w+(-[0-9a-f]{12})?\.parquet")  # names that `Run.commit` gives
COMPLETE_NOTE = ("_runs", "manifest.json")  # is there while nothing is pending and `finish` has run


class DamagedRun(RuntimeError):
    """Something that was committed is missing or not readable. Every reader raises it rather than read less."""

    def __init__(self, run: Run, what: str, *, surely: bool = True):
        verb = "is" if surely else "may be"
        super().__init__(f"{run} {verb} damaged: {what}; raypipe verify {run} lists what is wrong, --repair mends it")


def new_attempt() -> str:
    """An attempt's name: sorts by UTC start time; the random end keeps two hosts apart."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}Z-{secrets.token_hex(2)}"


class Run:
    """The folder of one run, on any file system. Cheap to pickle."""

    def __init__(self, output: str, method: str | None = None, table: str | None = None):
        """table: a name in schema.TABLES. Both are None for readers, who find them in run.json."""
        self.folder = Folder(output)
        self._method, self._table = method, table or (method and "masks")
        self._stamp: dict[bytes, bytes] = {}  # what each part repeats of run.json

    def __str__(self) -> str:
        return str(self.folder)

    # Configuration

    def configuration(self) -> dict | None:
        """The content of run.json: `method`, `table`, `settings` (frozen) and `provenance`; None for a new run.

        Raises DamagedRun when it is not what it was, and NewerRun.
        """
        content = self.folder.read("run.json")  # a store that cannot be reached is not damaged
        try:
            found = None if content is None else parsed(content)
            refuse_newer(self, found["schema"] if found else 0)
            return found
        except NewerRun:
            raise
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, json.JSONDecodeError) and not self.there():
                return None  # the very first file was torn, and nothing came after it
            raise DamagedRun(self, f"its run.json cannot be read ({error!r})") from error

    def check_configuration(self, settings: dict, *, defaults: dict) -> None:
        """Raise OtherConfiguration with a diff when the folder holds a run of another configuration.

        Raises DamagedRun when it holds masks without a configuration. defaults: those of all settings, which hold for
        a setting that the run's version of raypipe did not have.
        """
        if frozen := self.configuration():
            old = {"method": frozen["method"], "table": frozen["table"], **defaults, **frozen["settings"]}
            new = {"method": self._method, "table": self._table, **settings}
            refuse_other(f"{self} holds a run of another configuration", old, new)
        elif there := self.there():
            raise DamagedRun(self, f"it has {there[0][0]} but no run.json")

    def freeze(self, settings: dict, provenance: dict) -> None:
        """Write run.json once. A run that has one keeps it; other weights (`provenance["weights"]`) are refused."""
        frozen = self.configuration()
        content = {"schema": schema.VERSION, "method": self.method, "table": self.table}
        content |= {"settings": settings, "provenance": provenance}
        self._stamp = {b"raypipe.run": json.dumps(frozen or content, default=str).encode()}
        if frozen is None:
            self.folder.write_json(content, "run.json")
        else:
            old, new = ({"weights": each["weights"]} for each in (frozen["provenance"], provenance))
            refuse_other(f"{self} was made with other weights", old, new)

    # Planning and cleaning

    def clean(self) -> None:
        """Delete what a killed attempt left: parts without record, records without part, old temporary files.

        What seems to be left is asked for by its name before it goes: listings may lag behind, and who was fenced off
        may go on. Raises RuntimeError when a finished run has parts but no records: it was copied without them.
        """
        parts, commits = self.folder.files(self.data), self.folder.files("_commits")
        if not commits and self._has_lost_records(parts):
            raise RuntimeError(f"{self} is a finished run without its folder _commits; copy that too, or verify it")
        for name in filter(OURS.fullmatch, parts.keys() - commits.keys()):
            if self.folder.size("_commits", name) is None:
                self.folder.delete(self.data, name)
        for name in filter(OURS.fullmatch, commits.keys() - parts.keys()):
            if self.folder.size(self.data, name) is None:
                self.folder.delete("_commits", name)
        for names in self.folders():
            for name in self.folder.dead_files(*names):
                self.folder.delete(*names, name)
        for name in self.folder.folders("_runs"):
            self.folder.delete_folder("_runs", name)  # work lists of ended attempts

    def commits(self) -> Spool:
        """All committed ids: `image_id`, `error`, `part` (file name). An id may stand twice after a retry.

        Raises DamagedRun when a record is not readable or a data file has not the recorded size.
        """
        columns = schema.COMMIT.append(pa.field("part", pa.string()))
        records = map_ahead(self._read_commit, self.sizes().items())
        return Spool.of(columns, portions((batch for record in records for batch in record.to_batches()), ROWS))

    def plan(
        self, manifest: pa.Table | Spool, *, retry_errors: bool = False, limit: int | None = None
    ) -> pa.Table | Spool:
        """The rows of the manifest that are not committed yet, at most `limit`. With retry_errors, failed ones too.

        They are what the manifest is: a table or a spool. In memory is little but a table.
        """
        done = self.commits().to_batches()
        if retry_errors:
            done = (batch.filter(pc.equal(batch["error"], "")) for batch in done)
        return manifest.filter(pc.invert(Ids(done).among(manifest))).slice(0, limit)

    def write_pending(self, pending: pa.Table | Spool, attempt: str) -> tuple[pafs.FileSystem, list[str]]:
        """Write the attempt's work list; returns file system and paths for `ray.data.read_parquet`."""
        paths = []
        for i, rows in enumerate(portions(pending.to_batches(), PENDING_ROWS)):
            names = "_runs", attempt, f"pending-{i:05d}.parquet"
            self.folder.write_table(rows, *names)
            paths.append(self.folder.path(*names))
        return self.folder.fs, paths

    # Committing

    def commit(self, attempt: str, task: int | str, rows: pa.Table) -> None:
        """Make rows (of `columns`) durable: the part, then, if this attempt still holds the lock, its record.

        The same task may run again after a worker that seemed lost: a name tells what is in its part, so they do not
        write over each other, and of rows that differ, if only in their seconds, those count that `superseded` keeps.
        """
        content = parquet_bytes(rows.cast(self.columns).replace_schema_metadata(self.part_metadata()))
        task = f"{task:06d}" if isinstance(task, int) else task
        name = f"part-{attempt}-{task}-{hashlib.sha256(content).hexdigest()[:12]}.parquet"
        self.write_record(attempt, name, self.write_part(name, content, rows))

    def write_part(self, name: str, content: bytes | memoryview, rows: pa.Table) -> pa.Table:
        """Put a data file. Returns its commit record; the file counts once `write_record` has put that.

        rows: at least the columns of schema COMMIT, of exactly the rows in the file.
        """
        self.folder.write(content, self.data, name)
        part = {"rows": len(rows), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        record = rows.select(schema.COMMIT.names).cast(schema.COMMIT)
        return record.replace_schema_metadata({"raypipe.part": json.dumps(part)})

    def write_record(self, attempt: str, name: str, record: pa.Table) -> None:
        """Put a part's commit record, if the attempt still holds the lock; raises storage.Locked else.

        Then looks again: another attempt, or this one's end, may have taken the part for left over meanwhile.
        """
        fence(self.folder, attempt)
        self.folder.write(seal(parquet_bytes(record)), "_commits", name)
        if self.folder.size(self.data, name) is None:
            self.folder.delete("_commits", name)
            raise Locked(f"{self}: {name} was cleaned away before it was committed; its images will be done again")
        fence(self.folder, attempt)

    def drop(self, name: str) -> None:
        """Delete a part: its record first, so that a kill in between leaves a file that does not count."""
        self.folder.delete("_commits", name)
        self.folder.delete(self.data, name)

    def part_metadata(self) -> dict[bytes, bytes]:
        """What each part's schema carries: the version of the columns and the content of run.json."""
        if not self._stamp and (frozen := self.configuration()):
            self._stamp = {b"raypipe.run": json.dumps(frozen).encode()}
        return self.columns.metadata | self._stamp

    def finish(self, attempt: str) -> Spool:
        """Leave each id once, write errors.parquet, drop the work list; returns the commits that remain."""
        self.clean()  # a worker of a dead attempt may have left a part or a record after this attempt's own clean
        commits = self.commits()
        if lost := superseded(commits):
            commits = self._without(lost, attempt)
        self.folder.write_table(self._errors(commits), "errors.parquet")
        return commits

    def settled(self, attempt: str) -> Spool:
        """The commits of a run that has ended, ended once more if a late worker has added to it since."""
        commits, listed = self.commits(), self.errors()
        failed = Ids(batch.filter(pc.not_equal(batch["error"], "")) for batch in commits.to_batches())
        is_listed = len(failed) == failed.among(listed).true_count == len(listed)
        return commits if is_listed and not superseded(commits) else self.finish(attempt)

    def errors(self) -> pa.Table:
        """The failed images as `finish` listed them last (schema ERRORS); empty where that list cannot be read."""
        try:
            with self.folder.open("errors.parquet") as file:
                return open_table(file).read().cast(schema.ERRORS)
        except (ValueError, KeyError, OSError):  # `verify` tells
            return schema.ERRORS.empty_table()

    def is_complete(self) -> bool:
        """Whether the run ended with nothing pending and has not been started on new images since."""
        return self.completed() is not None

    def completed(self) -> dict | None:
        """The summary that `mark_complete` noted, {} when it is not readable; None when the run is not complete."""
        try:
            note = self.folder.read_json(*COMPLETE_NOTE)
        except ValueError:
            return {}
        return note if note is None or isinstance(note, dict) else {}

    def mark_complete(self, summary: dict | None) -> None:
        """Note, as the last step, that nothing is pending; None takes the note back before new work."""
        if summary is None:
            self.folder.delete(*COMPLETE_NOTE)
        else:
            self.folder.write_json(summary, *COMPLETE_NOTE)

    def _without(self, lost: set[tuple[str, str]], attempt: str) -> Spool:
        """Rewrite the parts that hold `superseded` rows, so that plain readers see each id once; returns the commits.

        The new part is committed before the old one goes: a kill in between leaves an id twice, which the rule of
        `superseded` settles again.
        """
        for part in sorted({part for _, part in lost}):
            with self.part(part) as file:
                rows = file.read()
            ids = pa.array([image_id for image_id, name in lost if name == part], pa.string())
            kept = rows.filter(pc.invert(pc.is_in(rows["image_id"], value_set=ids)))
            if len(kept):
                self.commit(attempt, "kept", kept)
            self.drop(part)
        return self.commits()

    def _errors(self, commits: Spool) -> pa.Table:
        """The failed images as a table for people: image_id, uri, key, stage, kind, message, retryable."""
        failed = (batch.filter(pc.not_equal(batch["error"], "")) for batch in commits.to_batches())
        tables = [schema.ERRORS.empty_table()]
        for name in sorted({name for batch in failed for name in pc.unique(batch["part"]).to_pylist()}):
            with self.part(name) as part:
                table = part.read(columns=["image_id", "uri", "key", "error"])
            rows = table.filter(pc.field("error") != "").to_pylist()
            for row in rows:
                row["stage"], row["kind"], row["message"] = (row["error"].split(": ", 2) + ["", ""])[:3]
                row["retryable"] = row["kind"] in RETRYABLE
            tables.append(pa.Table.from_pylist(rows, schema=schema.ERRORS))
        return pa.concat_tables(tables)

    @property
    def method(self) -> str:
        """The method that made the run. Raises FileNotFoundError when the folder is no run, DamagedRun as below."""
        return self._method or self._find()["method"]

    @property
    def table(self) -> str:
        """What its rows are: a name in schema.TABLES. Raises as `method` does."""
        return self._table or self._find()["table"]

    @property
    def columns(self) -> pa.Schema:
        """The columns of its parts."""
        return schema.TABLES[self.table]

    def _find(self) -> dict:
        frozen, there = self.configuration(), self.there()
        if frozen is None and there:
            raise DamagedRun(self, f"it has {there[0][0]} but no run.json")
        if frozen is None:
            raise FileNotFoundError(f"{self}: {self._why_none()}, so it is not a raypipe run")
        self._method, self._table = frozen["method"], frozen["table"]
        return frozen

    def there(self) -> list[tuple[str, str]]:
        """Tables and methods whose parts are in the folder, whatever run.json says."""
        found = [(table, name) for table in schema.TABLES for name in self.folder.folders(table)]
        return [(table, name.removeprefix("method=")) for table, name in found if name.startswith("method=")]

    def _why_none(self) -> str:
        kind = self.folder.fs.get_file_info(self.folder.path()).type
        why = {pafs.FileType.NotFound: "it does not exist", pafs.FileType.File: "it is a file"}
        return why.get(kind, "no run.json in it")

    @property
    def data(self) -> str:
        """The one folder of this run's parts, relative to the run's. Raises FileNotFoundError when it is no run."""
        return f"{self.table}/method={self.method}"

    def folders(self) -> tuple[tuple[str, ...], ...]:
        """The folders that hold a run's files, each as names beneath the run's own."""
        return (self.data,), ("_commits",), ("_runs",), ()

    def open(self, part: str) -> pa.NativeFile:
        """A part's data file. Raises FileNotFoundError when another process has replaced it."""
        return self.folder.open(self.data, part)

    @contextmanager
    def part(self, name: str) -> Iterator[pq.ParquetFile]:  # noqa: TID251
        """A part to read, with the columns of its version. Raises FileNotFoundError as `open` does, NewerRun, and
        DamagedRun when it cannot be read."""
        try:
            with self.open(name) as file, open_table(file, checked=True) as part:
                version = version_of(part.schema_arrow)
                refuse_newer(self, version)
                if list(part.schema_arrow) != list(schema.as_of(version, self.columns)):
                    raise ValueError("it has other columns")
                yield part
        except (FileNotFoundError, NewerRun):
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            what = f"its part {self.data}/{name} cannot be read ({one_line(error)})"
            raise DamagedRun(self, what, surely=not isinstance(error, OSError)) from error

    def parts(self) -> list[str]:
        """Names of the parts, oldest first. Raises DamagedRun as `sizes` does."""
        return list(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Bytes of each part's data file by name, oldest first.

        Raises DamagedRun when data files are gone whose commit records are there, or all records of a finished run; not
        when its images have other rows: a record may land after its worker's death, its part cleaned away. Before they
        have, in an interrupted run, that cannot be told from damage; the next start mends it.
        """
        while True:  # again when another process has dropped parts since the records were listed
            records, files = self.folder.files("_commits").keys(), self.folder.files(self.data)
            sizes = {name: files[name].size for name in records & files.keys()}
            for name in filter(OURS.fullmatch, records - files.keys()):
                sizes[name] = self.folder.size(self.data, name)  # a listing may lack what is new
            there = {name: size for name, size in sorted(sizes.items()) if size is not None}
            lost = sorted(name for name in sizes.keys() - there if self.folder.size("_commits", name) is not None)
            if lost and not self._are_elsewhere(lost, there):
                raise DamagedRun(self, f"{len(lost):,} of {len(records):,} parts are gone, such as {lost[0]}")
            if len(sizes) == len(there) + len(lost):
                break
        if not records and self._has_lost_records(files):
            raise DamagedRun(self, "the records of its parts are gone (folder _commits)")
        return there

    def _has_lost_records(self, parts: Iterable[str]) -> bool:
        """Whether a finished run has parts, and none of them a record. None is listed: one is asked for by its name."""
        return any(self.folder.size("_commits", name) is None for name in list(parts)[:1]) and self.is_complete()

    def _are_elsewhere(self, lost: list[str], sizes: dict[str, int]) -> bool:
        """Whether each image of the records `lost` has a row that is as good in another part."""
        good, there = Ids(), Ids()
        for record in map_ahead(self._read_commit, sizes.items()):
            there.add(record)
            good.add(record.filter(pc.equal(record["error"], "")))
        rows = pa.concat_tables(self._read_commit((name, None)) for name in lost)
        return pc.all(pc.if_else(pc.equal(rows["error"], ""), good.among(rows), there.among(rows))).as_py()

    def _read_commit(self, part: tuple[str, int | None]) -> pa.Table:
        """The record of a part. part: its name and the bytes of its data file; None = they are gone."""
        name, size = part
        content = self.folder.read("_commits", name)
        if content is None:
            raise FileNotFoundError(f"{self}: another process has replaced the part {name}")
        try:
            if is_sealed(content) is False:
                raise ValueError("its checksum is wrong")
            rows = open_table(content).read(use_threads=False)  # records are read in parallel
            recorded = json.loads(rows.schema.metadata[b"raypipe.part"])["bytes"]
            rows = rows.select(schema.COMMIT.names).replace_schema_metadata()
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DamagedRun(self, f"its commit record {name} cannot be read ({one_line(error)})") from error
        if size not in (recorded, None):
            raise DamagedRun(self, f"its part {self.data}/{name} has {size:,} of {recorded:,} bytes")
        return rows.append_column("part", pa.repeat(name, len(rows)))
