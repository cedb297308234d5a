"""`raypipe verify`: whether a run still holds what was committed, and what to do where it does not.

Every data file is read once and compared with its commit record, which has a checksum of its own. Repair removes what
is damaged, so that `raypipe label` with the same options does those images again; nothing else is touched.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import pyarrow as pa
import pyarrow.compute as pc
import tyro

from raypipe import schema
from raypipe.maintenance import redo
from raypipe.maintenance.integrity import Part, Problem, check_part
from raypipe.run import OURS, DamagedRun, Run, new_attempt, parsed, superseded
from raypipe.run.attempts import newest_by_input, read_record
from raypipe.run.rows import columns
from raypipe.runtime.interruption import held
from raypipe.runtime.progress import count_of
from raypipe.storage import live_attempt, open_table, without_secrets

PARTS_AHEAD = 16  # read at a time
MENDED = {  # kinds of problems that repair ends without removing rows, and how
    "configuration": "run.json written as the parts repeat it",
    "errors": "errors.parquet written",
    "doubled": "images that stood in two parts kept once",
    "checksum": "commit records given their checksum",
    "orphan": "data files without a record deleted",
    "leftover": "leftovers of ended attempts deleted",
    "attempt": "unreadable records of attempts deleted",
}
UNMENDED = ("unlabelled", "foreign", "twice")  # kinds that repair leaves as they are


@dataclass(frozen=True)
class Verify:
    """Read a whole run and tell what is torn, altered, missing, doubled or left over."""

    run: tyro.conf.Positional[str]  # the run's folder: a path or a URI
    deep: bool = False  # also decode every mask and compare it with its area, box and size
    repair: bool = False  # remove what is damaged; good parts are not touched
    redo: bool = False  # after a repair, label what has no row any more, with the recorded options


@dataclass(frozen=True)
class Verified:
    """What `verify` found and did."""

    run: str
    parts: int
    rows: int  # as the readable commit records tell
    bytes: int  # of the data files
    seconds: float
    problems: list[Problem]
    repaired: bool
    removed: int  # parts that repair removed
    relabelled: int  # images that redo labelled
    left: list[Problem]  # what is wrong now
    commands: list[str]  # what labels the removed images again
    exit_code: int  # 0 when nothing is wrong (any more), else 1

    def text(self) -> str:
        """One line per problem, what was done, and what to do."""
        counts = f"{count_of(self.parts, 'part')}, {count_of(self.rows, 'row')}"
        lines = [f"{counts}, {self.bytes / 1e6:,.1f} MB read in {self.seconds:.1f} s"]
        lines += [f"{problem.kind:<14}{problem.file}  {problem.text}" for problem in self.problems]
        if not self.problems:
            return "\n".join([*lines, "clean: every committed row is there, once and unchanged"])
        counts = Counter(problem.kind for problem in self.problems)
        lines.append("problems: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items()))
        if self.repaired:
            lines += [f"repaired: {each}" for each in self._mended()]
            lines += [f"labelled again: {count_of(self.relabelled, 'image')}"] if self.relabelled else []
            lines += [f"still wrong: {problem.kind}  {problem.file}  {problem.text}" for problem in self.left]
            lines += [] if self.left else ["clean now: every committed row is there, once and unchanged"]
        elif any(problem.kind not in UNMENDED for problem in self.problems):
            lines.append(f"to repair: raypipe verify {self.run} --repair")
        if self.commands:
            lines += ["to label the images that have no row any more:", *(f"  {line}" for line in self.commands)]
        return "\n".join(lines)

    def _mended(self) -> list[str]:
        """What repair did, a line each."""
        removed = f"{count_of(self.removed, 'damaged part')} removed, the others are untouched"
        kinds = {problem.kind for problem in self.problems} - {problem.kind for problem in self.left}
        return [removed] * bool(self.removed) + [text for kind, text in MENDED.items() if kind in kinds]


@dataclass(frozen=True)
class Findings:
    """All that is wrong with a run, and the parts that were read."""

    problems: list[Problem]
    parts: list[Part]
    rows: int
    configuration: dict | None  # what run.json should hold, where it does not; None when it is right or unknown


def verify(options: Verify) -> Verified:
    """Check a run, and repair it if asked to. Reads everything once, in threads; safe beside a job that writes.

    Raises FileNotFoundError when the folder is no run, storage.Locked when a repair finds a job at work, ValueError for
    redo without repair, run.NewerRun, and with redo whatever `pipeline.label.label` raises.
    """
    if options.redo and not options.repair:
        raise ValueError("--redo has no effect without --repair")
    start, run = time.monotonic(), _open(options.run)
    found = mend(run, deep=options.deep) if options.repair else find(run, deep=options.deep)
    removed = [part for part in found.parts if part.is_condemned] if options.repair else []
    left = _left(run, found, removed) if options.repair else found.problems
    relabelled = 0
    if options.redo and any(problem.kind == "unlabelled" for problem in left):
        relabelled = redo.label_again(run)
        left = _left(run, found, [part for part in removed if part.record is not None])
    commands = redo.commands(run) if any(problem.kind == "unlabelled" for problem in left) else []
    return Verified(
        run=without_secrets(options.run),
        parts=len(found.parts),
        rows=found.rows,
        bytes=sum(part.bytes for part in found.parts),
        seconds=round(time.monotonic() - start, 3),
        problems=found.problems,
        repaired=options.repair,
        removed=len(removed),
        relabelled=relabelled,
        left=left,
        commands=commands,
        exit_code=1 if left else 0,
    )


def find(run: Run, *, deep: bool = False, own: str | None = None) -> Findings:
    """Everything that is wrong with a run. own: the caller's attempt, if it holds the lock."""
    live = live_attempt(run.folder)
    live = None if live == own else live
    # In this order: a part is there before its record.
    records, files = set(run.folder.files("_commits")), set(run.folder.files(run.data))
    strays = {name for name in records ^ files if not OURS.fullmatch(name)}
    with ThreadPoolExecutor(PARTS_AHEAD) as pool:
        parts = list(pool.map(partial(check_part, run, deep=deep), sorted(records - strays)))
    problems = [part.problem for part in parts if part.problem]
    foreign = [f"{run.data if name in files else '_commits'}/{name}" for name in sorted(strays)]
    problems += [Problem(name, "foreign", "no file of raypipe's; move it away") for name in foreign]
    orphans = [name for name in sorted(files - records - strays) if live is None or live not in name]
    problems += [Problem(f"{run.data}/{name}", "orphan", "a data file without commit record") for name in orphans]
    problems += _leftovers(run, live)
    remarks, configuration = _check_configuration(run, parts)
    problems += remarks
    tables = [part.record.select(schema.COMMIT.names) for part in parts if part.record is not None]
    commits = pa.concat_tables([schema.COMMIT.empty_table(), *tables])
    rows = pc.count_distinct(commits["image_id"]).as_py()
    if live is None and len(tables) == len(parts):  # else the records do not tell all ids
        problems += _check_ids(run, parts, commits)
        problems += _unlabelled(run, rows)
        problems += [] if problems else _check_photographs(run)
    return Findings(problems, parts, rows, configuration)


def mend(run: Run, *, deep: bool = False) -> Findings:
    """Find what is wrong and remove or restore it, under the lock. Returns what was wrong. A kill at any time is safe.

    Raises RuntimeError, having deleted nothing, when run.json is lost and the parts do not tell it either, and when a
    finished run has no commit record at all: it was copied without them.
    """
    attempt = new_attempt()
    with held(run.folder, attempt):
        found = find(run, deep=deep, own=attempt)
        if found.configuration:
            run.folder.write_json(found.configuration, "run.json")
        elif _configuration(run) is None:
            raise RuntimeError(f"{run}: run.json is lost and no good part repeats it; label into another --output")
        run.clean()  # orphans, leftovers
        if any(part.is_condemned for part in found.parts) or any(p.kind == "unlabelled" for p in found.problems):
            run.mark_complete(None)  # what is left can be read
        for part in found.parts:
            if part.is_condemned:
                run.drop(part.name)
            elif part.problem:
                run.write_record(attempt, part.name, part.record)
        for problem in found.problems:
            if problem.kind == "attempt":
                run.folder.delete(problem.file)
        run.finish(attempt)  # doubled ids, errors.parquet
    return found


def _open(uri: str) -> Run:
    """The run in a folder, also when run.json is damaged. Raises FileNotFoundError when it is no run, and NewerRun."""
    found = _configuration(Run(uri))
    if found:
        return Run(uri, found["method"], found["table"])
    there = Run(uri).there()
    if len(there) > 1:
        raise FileNotFoundError(f"{Run(uri)}: no run.json and parts of {len(there)} methods, so it is no raypipe run")
    return Run(uri, there[0][1], there[0][0]) if there else Run(uri, Run(uri).method)


def _configuration(run: Run) -> dict | None:
    """The content of run.json; None when it is missing or unreadable."""
    try:
        return run.configuration()
    except DamagedRun:
        return None


# The rest of the folder


def _leftovers(run: Run, live: str | None) -> Iterator[Problem]:
    """Work lists and temporary files of ended attempts, unreadable attempt records, folders that are not the run's."""
    for name in run.folder.folders("_runs"):
        if name != live:
            yield Problem(f"_runs/{name}/", "leftover", "the work list of an attempt that ended")
    for names in run.folders():
        for name in run.folder.dead_files(*names):
            yield Problem("/".join((*names, name)), "leftover", "a temporary file that no process writes")
    for name in sorted(run.folder.files("_runs")):
        if name.endswith(".json") and read_record(run.folder, name) is None:
            yield Problem(f"_runs/{name}", "attempt", "the attempt's record is not JSON")
    for name in run.folder.folders(run.table):
        if f"{run.table}/{name}" != run.data:
            yield Problem(f"{run.table}/{name}/", "foreign", "not of this run, but plain readers find it; move it away")


def _check_configuration(run: Run, parts: list[Part]) -> tuple[list[Problem], dict | None]:
    """Compare run.json with what the good parts repeat of it. Returns problems, and what it should hold instead."""
    found, stamps = _configuration(run), [parsed(part.stamp) for part in parts if part.stamp]
    repeated = [stamp for i, stamp in enumerate(stamps) if stamp not in stamps[:i]]
    if len(repeated) > 1:
        text = f"the parts repeat {len(repeated)} different configurations"
        return [Problem("run.json", "configuration", text)], None
    if found and (not repeated or found == repeated[0]):
        return [], None
    text = "differs from what the parts repeat of it" if found else "missing or not readable"
    return [Problem("run.json", "configuration", text)], repeated[0] if repeated else None


def _check_ids(run: Run, parts: list[Part], commits: pa.Table) -> Iterator[Problem]:
    """Ids that stand in several parts, and errors.parquet. commits: the ids and errors of all parts, in order."""
    names = [pa.repeat(pa.scalar(part.name), len(part.record)) for part in parts]
    commits = commits.append_column("part", pa.chunked_array(names, pa.string()))
    lost = superseded(commits)
    for name, count in sorted(Counter(name for _, name in lost).items()):
        text = f"{count} of its images also stand in another part, which counts"
        yield Problem(f"{run.data}/{name}", "doubled", text)
    failed = {(row["image_id"], row["part"]) for row in commits.filter(pc.not_equal(commits["error"], "")).to_pylist()}
    if parts and _listed_errors(run) != {image_id for image_id, _ in failed - lost}:
        yield Problem("errors.parquet", "errors", "missing, unreadable, or does not list exactly the failed images")


def _check_photographs(run: Run) -> list[Problem]:
    """Photographs that were labelled once for each of several places: rows of the same key and the same bytes."""
    rows = pa.concat_tables(columns(run, ["key", "sha256"])) if run.parts() else pa.table({"key": [], "sha256": []})
    counts = rows.filter(pc.field("sha256") != "").group_by(["key", "sha256"]).aggregate([([], "count_all")])
    twice = counts.filter(pc.field("count_all") > 1)
    if not len(twice):
        return []
    text = f"{count_of(len(twice), 'photograph')} with several rows, from several places, such as {twice['key'][0]}"
    return [Problem(f"{run.data}/", "twice", f"{text}; label the places into runs of their own")]


def _listed_errors(run: Run) -> set[str] | None:
    """The image ids in errors.parquet; None when it cannot be read."""
    try:
        with run.folder.open("errors.parquet") as file:
            return set(open_table(file).read()["image_id"].to_pylist())
    except (ValueError, KeyError, OSError):
        return None


# Images without a row


def _unlabelled(run: Run, rows: int) -> list[Problem]:
    """Images that an ended attempt had rows for and that have none now. rows: how many have one."""
    labelled = {f"_runs/{each.attempt}.json": each.labelled or 0 for each in newest_by_input(run)}
    labelled["_runs/manifest.json"] = (run.completed() or {}).get("images", 0)
    file, count = max(labelled.items(), key=itemgetter(1))
    if count <= rows:
        return []
    text = f"no row any more for {count_of(count - rows, 'image')}: {count:,} had one when this was written"
    return [Problem(file, "unlabelled", text)]


def _left(run: Run, found: Findings, removed: list[Part]) -> list[Problem]:
    """What is still wrong after a repair: images without a row, folders of others, parts of several configurations."""
    left, _ = _check_configuration(run, [part for part in found.parts if not part.is_condemned])
    left += [problem for problem in found.problems if problem.kind in ("foreign", "twice")]
    now = set(run.commits()["image_id"].to_pylist())
    records = [part.record for part in removed if part.record is not None]
    lost = {image_id for record in records for image_id in record["image_id"].to_pylist()} - now
    if lost or len(records) < len(removed):
        whose = count_of(len(lost), "image") if len(records) == len(removed) else "the images"
        return [*left, Problem(f"{run.data}/", "unlabelled", f"no row any more for {whose} of removed parts")]
    return left + _unlabelled(run, len(now))
