"""A run's folder: which images are pending, who may write, what is committed. Plain functions over files, no Ray.

    <output>/run.json                                 the frozen configuration, with provenance
    <output>/masks/method=<m>/part-<attempt>-<task>.parquet
    <output>/_commits/part-<attempt>-<task>.parquet   ids and errors of those rows, sealed; written last
    <output>/_runs/<attempt>.json                     one record per attempt; LOCK; the attempt's pending images

A part counts once its commit record exists, so a run may be killed at any moment: what has no record is deleted at the
next start and done again.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from raypipe import schema
from raypipe.storage import Folder, lock
from raypipe.types import RETRYABLE

PENDING_ROWS = 20_000  # images per pending file: enough files for parallel reads, few enough to list
GROUP_ROWS = 1000  # rows of a Parquet row group: few, since they hold masks
OURS = re.compile(r"part-\d{8}T\d+Z-[0-9a-f]{4}-\w+(-[0-9a-f]{12})?\.parquet")  # names that `Run.commit` gives
COMPLETE = ("_runs", "manifest.json")  # is there while nothing is pending and `finish` has run
SEAL = b"raypipe:"  # stands before a commit record's own checksum


class OtherConfiguration(RuntimeError):
    """The output holds masks of another method or of other parameters."""


def new_attempt() -> str:
    """An attempt's name: sorts by UTC start time; the random end keeps two hosts apart."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}Z-{secrets.token_hex(2)}"


class Run:
    """The folder of one labelling run, on any file system. Cheap to pickle."""

    def __init__(self, output: str, method: str | None = None):
        self.folder = Folder(output)
        self._method = method  # None for readers, who find it in run.json
        self._stamp: dict[bytes, bytes] = {}  # what each part repeats of run.json

    def __str__(self) -> str:
        return str(self.folder)

    def dataset(self) -> tuple[pafs.FileSystem, list[str]]:
        """File system and paths of all committed parts, by name: what a reader of the whole run opens."""
        return self.folder.fs, [self.folder.path(self.masks, name) for name in self.parts()]

    # Configuration

    def configuration(self) -> dict | None:
        """The content of run.json: `method`, `settings` (frozen) and `provenance`; None for a new run."""
        content = self.folder.read("run.json")
        if content is None:
            return None
        try:
            found = json.loads(content)
            return {name: found[name] for name in ("schema", "method", "settings", "provenance")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self}/run.json is damaged ({error!r}); restore it or use another --output") from error

    def check_configuration(self, settings: dict, *, defaults: dict) -> None:
        """Raise OtherConfiguration with a diff when the folder holds a run of another configuration.

        defaults: those of all settings, which hold for a setting that the run's version of raypipe did not have.
        """
        found = self.configuration()
        if found is None:
            return
        old = {"method": found["method"], **defaults, **found["settings"]}
        new = {"method": self._method, **settings}
        old, new = json.loads(json.dumps([old, new]))  # a tuple comes back from run.json as a list
        changed = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
        if changed:
            lines = [f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in changed]
            raise OtherConfiguration(
                f"{self} holds a run of another configuration; use the same one or another --output\n"
                + "\n".join(lines)
            )

    def freeze(self, settings: dict, provenance: dict) -> None:
        """Write run.json once. A run that has one keeps it; other weights (`provenance["weights"]`) are refused."""
        found = self.configuration()
        content = {"schema": schema.VERSION, "method": self._method, "settings": settings, "provenance": provenance}
        self._stamp = {b"raypipe.run": json.dumps(found or content, default=str).encode()}
        if found is None:
            self.folder.write(_json(content), "run.json")
        elif found["provenance"]["weights"] != provenance["weights"]:
            raise OtherConfiguration(
                f"{self} was made with other weights; use the same ones or another --output\n"
                f"  weights: {found['provenance']['weights']} there, {provenance['weights']} now"
            )

    # Planning and cleaning

    def clean(self) -> None:
        """Delete what a killed attempt left: parts without record, records without part, old temporary files.

        Raises RuntimeError when a finished run has parts but no records: it was copied without them.
        """
        parts, commits = self.folder.files(self.masks), self.folder.files("_commits")
        if parts and not commits and self.is_complete():
            raise RuntimeError(f"{self} is a finished run without its folder _commits; copy that too, or verify it")
        for name in filter(OURS.fullmatch, parts.keys() - commits.keys()):
            self.folder.delete(self.masks, name)
        for name in filter(OURS.fullmatch, commits.keys() - parts.keys()):
            self.folder.delete("_commits", name)
        for place in ((self.masks,), ("_commits",), ("_runs",), ()):
            for name, info in self.folder.files(*place).items():
                if name.startswith("_tmp.") and (datetime.now(UTC) - info.mtime).total_seconds() > 3600:
                    self.folder.delete(*place, name)
        for name in self.folder.folders("_runs"):
            self.folder.delete_folder("_runs", name)  # work lists of ended attempts

    def commits(self) -> pa.Table:
        """All committed ids: `image_id`, `error`, `part` (file name). An id may stand twice after a retry."""
        names = self.parts()
        with ThreadPoolExecutor(16) as pool:
            tables = list(pool.map(self._read_commit, names))
        parts = [pa.repeat(pa.scalar(name), len(table)) for name, table in zip(names, tables, strict=True)]
        rows = pa.concat_tables([schema.COMMIT.empty_table(), *tables])
        return rows.append_column("part", pa.chunked_array(parts, pa.string()))

    def plan(self, manifest: pa.Table, *, retry_errors: bool = False, limit: int | None = None) -> pa.Table:
        """The rows of the manifest that are not committed yet, at most `limit`. With retry_errors, failed ones too."""
        commits = self.commits()
        if retry_errors:
            commits = commits.filter(pc.equal(commits["error"], ""))
        done = pc.is_in(manifest["image_id"], value_set=commits["image_id"].combine_chunks())
        pending = manifest.filter(pc.invert(done))
        return pending if limit is None else pending.slice(0, limit)

    def write_pending(self, pending: pa.Table, attempt: str) -> tuple[pafs.FileSystem, list[str]]:
        """Write the attempt's work list; returns file system and paths for `ray.data.read_parquet`."""
        paths = []
        for start in range(0, len(pending), PENDING_ROWS):
            name = f"pending-{start // PENDING_ROWS:05d}.parquet"
            self.folder.write(parquet_bytes(pending.slice(start, PENDING_ROWS)), "_runs", attempt, name)
            paths.append(self.folder.path("_runs", attempt, name))
        return self.folder.fs, paths

    # Committing

    def commit(self, attempt: str, task: int | str, rows: pa.Table) -> None:
        """Make rows (schema MASKS) durable: the part, then, if this attempt still holds the lock, its record.

        The same task may be run again after a lost worker: same names, same rows, overwritten.
        """
        name = f"part-{attempt}-{task:06d}.parquet" if isinstance(task, int) else f"part-{attempt}-{task}.parquet"
        content = parquet_bytes(rows.cast(schema.MASKS).replace_schema_metadata(self.part_metadata()))
        self.write_record(attempt, name, self.write_part(name, content, rows))

    def write_part(self, name: str, content: bytes | memoryview, rows: pa.Table) -> pa.Table:
        """Put a data file. Returns its commit record; the file counts once `write_record` has put that.

        rows: at least the columns of schema COMMIT, of exactly the rows in the file.
        """
        self.folder.write(content, self.masks, name)
        part = {"rows": len(rows), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        record = rows.select(schema.COMMIT.names).cast(schema.COMMIT)
        return record.replace_schema_metadata({"raypipe.part": json.dumps(part)})

    def write_record(self, attempt: str, name: str, record: pa.Table) -> None:
        """Put a part's commit record, if the attempt still holds the lock; raises lock.Locked else."""
        lock.fence(self.folder, attempt)
        self.folder.write(seal(parquet_bytes(record)), "_commits", name)

    def drop(self, name: str) -> None:
        """Delete a part: its record first, so that a kill in between leaves a file that does not count."""
        self.folder.delete("_commits", name)
        self.folder.delete(self.masks, name)

    def part_metadata(self) -> dict[bytes, bytes]:
        """What each part's schema carries: the version of the columns and the content of run.json."""
        if not self._stamp and (found := self.configuration()):
            self._stamp = {b"raypipe.run": json.dumps(found).encode()}
        return schema.MASKS.metadata | self._stamp

    def finish(self, attempt: str) -> pa.Table:
        """Leave each id once, write errors.parquet, drop the work list; returns the commits that remain."""
        self.clean()  # a worker of a dead attempt may have left a part or a record after this attempt's own clean
        self._drop_superseded(attempt)
        commits = self.commits()
        self.folder.write(parquet_bytes(self._errors(commits)), "errors.parquet")
        return commits

    def is_complete(self) -> bool:
        """Whether the run ended with nothing pending and has not been started on new images since."""
        return self.folder.read(*COMPLETE) is not None

    def mark_complete(self, summary: dict | None) -> None:
        """Note, as the last step, that nothing is pending; None takes the note back before new work."""
        if summary is None:
            self.folder.delete(*COMPLETE)
        else:
            self.folder.write(_json(summary), *COMPLETE)

    def record_attempt(self, attempt: str, record: dict) -> None:
        """Write the attempt's record `_runs/<attempt>.json`."""
        self.folder.write(_json(record), "_runs", f"{attempt}.json")

    def load(self, columns: list[str] | None = None) -> pa.Table:
        """All committed rows, each id once, with the column `method`.

        Raises FileNotFoundError when it is no run and ValueError for an unknown column.
        """
        known = [*schema.MASKS.names, "method"]
        if unknown := set(columns or ()) - set(known):
            raise ValueError(f"unknown column {sorted(unknown)[0]!r}; choose from: {', '.join(known)}")
        stored = [name for name in schema.MASKS.names if columns is None or name in {"image_id", *columns}]
        for tries_left in (2, 1, 0):
            try:
                table = self._load(stored)
                return table if columns is None else table.select(columns)
            except FileNotFoundError:  # a job that retries errors, or `compact`, replaced a part since it was listed
                if not tries_left or self.configuration() is None:
                    raise
        raise AssertionError("unreachable")

    def _load(self, columns: list[str]) -> pa.Table:
        fs, paths = self.dataset()
        tables = [pq.read_table(path, filesystem=fs, columns=columns, partitioning=None) for path in paths]
        table = pa.concat_tables([schema.MASKS.empty_table().select(columns), *tables])
        lost = superseded(self.commits())
        if lost:
            parts = [
                PurePosixPath(path).name for path, table in zip(paths, tables, strict=True) for _ in range(len(table))
            ]
            keep = [pair not in lost for pair in zip(table["image_id"].to_pylist(), parts, strict=True)]
            table = table.filter(pa.array(keep))
        return table.append_column("method", pa.array([self._method] * len(table), pa.string()))

    def _drop_superseded(self, attempt: str) -> None:
        """Rewrite the parts that hold rows which a later attempt did again, so that plain readers see each id once.

        The new part is committed before the old one goes: a kill in between leaves an id twice, which the rule of
        `superseded` settles again.
        """
        lost = superseded(self.commits())
        folder = self.masks
        for part in sorted({part for _, part in lost}):
            content = self.folder.read(folder, part)
            rows = pq.read_table(io.BytesIO(content))
            ids = pa.array([image_id for image_id, name in lost if name == part], pa.string())
            kept = rows.filter(pc.invert(pc.is_in(rows["image_id"], value_set=ids)))
            if len(kept):
                self.commit(attempt, f"kept-{hashlib.sha256(part.encode()).hexdigest()[:12]}", kept)
            self.drop(part)

    def _errors(self, commits: pa.Table) -> pa.Table:
        """The failed images as a table for people: image_id, uri, key, stage, kind, message, retryable."""
        failed = commits.filter(pc.not_equal(commits["error"], ""))
        folder = self.masks
        rows = []
        for part in sorted(set(failed["part"].to_pylist())):
            table = pq.read_table(
                self.folder.path(folder, part),
                filesystem=self.folder.fs,
                columns=["image_id", "uri", "key", "error"],
                filters=pc.field("error") != "",
                partitioning=None,
            )
            rows += table.to_pylist()
        columns = {name: [row[name] for row in rows] for name in ("image_id", "uri", "key")}
        split = [(row["error"].split(": ", 2) + ["", ""])[:3] for row in rows]
        columns |= {name: [parts[i] for parts in split] for i, name in enumerate(("stage", "kind", "message"))}
        columns["retryable"] = [kind in RETRYABLE for kind in columns["kind"]]
        return pa.table(columns, schema=schema.ERRORS)

    @property
    def masks(self) -> str:
        """The one folder of this run's parts. Raises FileNotFoundError when the folder is no run."""
        if self._method is None:
            configuration = self.configuration()
            if configuration is None:
                raise FileNotFoundError(f"{self}: no run.json in it, so it is not a raypipe run")
            self._method = configuration["method"]
        return f"masks/method={self._method}"

    def parts(self) -> list[str]:
        """Names of the parts that have a commit record and a data file."""
        names = self.folder.files("_commits").keys() & self.folder.files(self.masks).keys()
        return sorted(name for name in names if not name.startswith("_tmp."))

    def _read_commit(self, name: str) -> pa.Table:
        content = self.folder.read("_commits", name) or b""
        try:
            if is_sealed(content) is False:
                raise ValueError("its checksum is wrong")
            return pq.read_table(io.BytesIO(content)).select(schema.COMMIT.names)
        except (ValueError, KeyError, OSError) as error:
            raise RuntimeError(
                f"{self}: commit record {name} is damaged ({error}); `raypipe verify {self} --repair` removes it, and "
                "the next run does its images again"
            ) from error


def superseded(commits: pa.Table) -> set[tuple[str, str]]:
    """(image_id, part) of the rows that lose where an id is committed more than once.

    The newest row without error counts, else the newest. Parts sort by attempt, hence by time.
    """
    counts = commits.group_by("image_id").aggregate([("error", "count")])
    twice = counts.filter(pc.greater(counts["error_count"], 1))["image_id"]
    rows = commits.filter(pc.is_in(commits["image_id"], value_set=twice.combine_chunks())).to_pylist()
    rows.sort(key=lambda row: (row["error"] == "", row["part"]))
    winners = {row["image_id"]: row["part"] for row in rows}
    return {(row["image_id"], row["part"]) for row in rows if winners[row["image_id"]] != row["part"]}


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as one Parquet file: zstd, row groups of 1,000 rows since they hold masks."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=GROUP_ROWS)
    return buffer.getvalue()


def seal(content: bytes) -> bytes:
    """A Parquet file with its own sha256 before the footer, where readers do not look: every flipped byte shows."""
    footer = _footer(content)
    return content[:footer] + SEAL + hashlib.sha256(content).digest() + content[footer:]


def is_sealed(content: bytes) -> bool | None:
    """Whether a file is as `seal` left it; None when it has no checksum, as in runs of the first versions."""
    footer = _footer(content)
    start = footer - len(SEAL) - hashlib.sha256().digest_size
    if start < 0 or not content.startswith(SEAL, start):
        return None
    return hashlib.sha256(content[:start] + content[footer:]).digest() == content[start + len(SEAL) : footer]


def _footer(content: bytes) -> int:
    """Where a Parquet file's footer begins; it ends with its length (4 bytes) and PAR1."""
    return len(content) - 8 - int.from_bytes(content[-8:-4], "little")


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, default=str) + "\n").encode()
