"""A run's folder: which images are pending, who may write, what is committed. Plain functions over files, no Ray.

    <output>/run.json                                 the frozen configuration, with provenance
    <output>/masks/method=<m>/part-<attempt>-<task>.parquet
    <output>/_commits/part-<attempt>-<task>.parquet   ids and errors of exactly those rows; written last
    <output>/_runs/<attempt>.json                     one record per attempt; LOCK; the attempt's pending images

A part counts once its commit record exists, so a run may be killed at any moment: what has no record is deleted at the
next start and done again.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from raypipe import lock, schema
from raypipe.folder import Folder
from raypipe.types import RETRYABLE

PENDING_ROWS = 20_000  # images per pending file: enough files for parallel reads, few enough to list


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
        return None if content is None else json.loads(content)

    def check_configuration(self, settings: dict) -> None:
        """Raise OtherConfiguration with a diff when the folder holds a run of another configuration."""
        found = self.configuration()
        if found is None:
            return
        old, new = {"method": found["method"], **found["settings"]}, {"method": self._method, **settings}
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
        """Delete what a killed attempt left: parts without record, records without part, old temporary files."""
        folder = self.masks
        parts, commits = self.folder.files(folder), self.folder.files("_commits")
        for name in parts.keys() - commits.keys():
            if not name.startswith("_tmp."):
                self.folder.delete(folder, name)
        for name in commits.keys() - parts.keys():
            if not name.startswith("_tmp."):
                self.folder.delete("_commits", name)
        for place, infos in ((folder, parts), ("_commits", commits), ("_runs", self.folder.files("_runs"))):
            for name, info in infos.items():
                if name.startswith("_tmp.") and (datetime.now(UTC) - info.mtime).total_seconds() > 3600:
                    self.folder.delete(place, name)
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
        rows = rows.cast(schema.MASKS).replace_schema_metadata(schema.MASKS.metadata | self._stamp)
        content = parquet_bytes(rows)
        self.folder.write(content, self.masks, name)
        part = {"rows": len(rows), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        record = rows.select(schema.COMMIT.names).cast(schema.COMMIT)
        record = record.replace_schema_metadata({"raypipe.part": json.dumps(part)})
        lock.fence(self.folder, attempt)
        self.folder.write(parquet_bytes(record), "_commits", name)

    def finish(self, attempt: str) -> pa.Table:
        """Leave each id once, write errors.parquet, drop the work list; returns the commits that remain."""
        self.clean()  # a worker of a dead attempt may have left a part or a record after this attempt's own clean
        self._drop_superseded(attempt)
        commits = self.commits()
        self.folder.write(parquet_bytes(self._errors(commits)), "errors.parquet")
        return commits

    def record_attempt(self, attempt: str, record: dict) -> None:
        """Write the attempt's record `_runs/<attempt>.json`."""
        self.folder.write(_json(record), "_runs", f"{attempt}.json")

    def load(self, columns: list[str] | None = None) -> pa.Table:
        """All committed rows, each id once, with the column `method`. Raises FileNotFoundError when it is no run."""
        fs, paths = self.dataset()
        stored = None if columns is None else [name for name in columns if name != "method"]
        wanted = stored and list(dict.fromkeys(["image_id", *stored]))
        tables = [pq.read_table(path, filesystem=fs, columns=wanted, partitioning=None) for path in paths]
        table = pa.concat_tables(tables) if tables else schema.MASKS.empty_table().select(wanted or schema.MASKS.names)
        lost = superseded(self.commits())
        if lost:
            parts = [
                PurePosixPath(path).name for path, table in zip(paths, tables, strict=True) for _ in range(len(table))
            ]
            keep = [pair not in lost for pair in zip(table["image_id"].to_pylist(), parts, strict=True)]
            table = table.filter(pa.array(keep))
        table = table.append_column("method", pa.array([self._method] * len(table), pa.string()))
        return table if columns is None else table.select(columns)

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
            self.folder.delete("_commits", part)
            self.folder.delete(folder, part)

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
        try:
            return pq.read_table(io.BytesIO(self.folder.read("_commits", name))).select(schema.COMMIT.names)
        except (pa.ArrowInvalid, OSError) as error:
            raise RuntimeError(
                f"{self}: commit record {name} is damaged ({error}); delete it, and the next run does its images again"
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
    pq.write_table(table, buffer, compression="zstd", row_group_size=1000)
    return buffer.getvalue()


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, default=str) + "\n").encode()
