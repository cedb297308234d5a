"""How a call of `label` ended, in numbers and in words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.run import Ids, Run, rows
from raypipe.runtime.progress import count_of_images, speed
from raypipe.storage import Spool

NAMED = 10  # failed images that the terminal names
BLOCKED = "label_blocked:"  # begins the word of a row's note that tells an entry of a block-list


@dataclass(frozen=True)
class Summary:
    """How a call of `label` ended."""

    output: str
    attempt: str
    images: int  # in the input
    labelled: int  # rows of this attempt, error rows included
    pending: int  # left for another attempt
    errors: dict[str, int]  # error rows of this attempt, by `stage: kind`
    failed: int  # error rows of the whole run
    seconds: float
    exit_code: int  # 0, or 3 when too many images failed: see `too_many`
    sheet: str | None = None  # where the picture sheet is
    reason: str = ""  # why the exit code is 3
    retryable: int = 0  # of the failed ones: how many may succeed another time as they are
    failures: dict[str, str] = field(default_factory=dict)  # up to ten failed images, new ones first: key -> sentence
    blocked: dict[str, int] = field(default_factory=dict)  # of the whole run: see `blocked`

    def text(self) -> str:
        """What was labelled, what failed and why, what is left, and where the masks are."""
        lines, before = [self._done()], self.images - self.labelled - self.pending
        if self.labelled and before > 0:
            lines.append(f"{count_of_images(before)} {'was' if before == 1 else 'were'} done before")
        if self.pending:
            verb = "is" if self.pending == 1 else "are"
            lines.append(f"{count_of_images(self.pending)} {verb} left; the same command goes on")
        if self.failed:
            lines += self._failed()
        if self.blocked:
            entries = ", ".join(f"{entry} in {count_of_images(count)}" for entry, count in self.blocked.items())
            lines.append(f"names were passed over by the block-list: {entries}")
        if self.exit_code:
            lines.append(f"exit code {self.exit_code}: {self.reason}")
        if self.sheet:
            lines.append(f"picture sheet: {self.sheet}")
        lines.append(f"masks: {self.output}/masks/**/*.parquet, or raypipe.load({self.output!r}) in Python")
        return "\n".join(lines)

    def _done(self) -> str:
        images, failed = count_of_images(self.images), sum(self.errors.values())
        if not self.labelled:
            return f"nothing to do: all of {images} were done before" if not self.pending else "nothing was labelled"
        verb = f"done in {self.seconds:.1f} s ({speed(self.labelled / self.seconds)})"
        verb = f"{verb}: {self.labelled - failed:,} labelled, {failed:,} failed" if failed else f"labelled{verb[4:]}"
        return f"{self.labelled:,} of {images} {verb}"

    def _failed(self) -> list[str]:
        """The failed images by name, why they failed, and what helps."""
        lines = [f"{count_of_images(self.failed)} failed in this run so far, see {self.output}/errors.parquet"]
        lines += [f"  {key}: {sentence}" for key, sentence in self.failures.items()]
        if self.failed > len(self.failures):
            lines.append(f"  and {self.failed - len(self.failures):,} more in errors.parquet")
            lines += [f"  {count:>7,}  {reason}" for reason, count in sorted(self.errors.items(), key=lambda e: -e[1])]
        return lines


def too_many(failed: int, images: int, *, allowed: float) -> str:
    """Why so many failed images are too many; "" if they are not. allowed: the largest share that is fine."""
    if failed <= allowed * images:
        return ""
    share = f"{failed:,} of {count_of_images(images)} failed ({failed / images:.0%})"
    others = "; the others are done" if failed < images else ""
    return f"{share}, more than --max-bad-fraction {allowed:g} allows{others}"


def blocked(run: Run) -> dict[str, int]:
    """How many images have names that were passed over, by the entry of the block-list; the most frequent first."""
    counts: Counter[str] = Counter()
    if "note" not in run.columns.names:  # a trial of a sweep
        return {}
    for part in rows.columns(run, ["note"]):
        words = pc.list_flatten(pc.split_pattern(part["note"], ","))
        counts.update(words.filter(pc.starts_with(words, BLOCKED)).to_pylist())
    return {entry.removeprefix(BLOCKED): count for entry, count in counts.most_common()}


def named(errors: pa.Table, first: Spool | pa.Table) -> dict[str, str]:
    """Key -> sentence of up to ten failed images. errors: schema ERRORS. first: the images that come first."""
    failed = Ids(errors.to_batches())
    new = Ids(batch.filter(failed.among(batch)) for batch in first.to_batches() if len(failed))
    is_old = pc.invert(new.among(errors))
    listed = errors.append_column("is_old", is_old).sort_by([("is_old", "ascending"), ("key", "ascending")])
    sentences = {}
    for row in listed.slice(0, NAMED).to_pylist():
        kind = f"{row['stage']}: {row['kind']}"
        sentences[row["key"]] = f"{row['message']} ({kind})" if row["message"] else kind
    return sentences
