"""What a run froze, in run.json and again in each of its parts: read, and compared with what is wanted now."""

from __future__ import annotations

import json

import pyarrow as pa

from raypipe import schema


class OtherConfiguration(RuntimeError):
    """The output holds masks of another method or of other parameters."""


class NewerRun(ValueError):
    """The folder holds columns of a version of raypipe that this one does not know."""


def refuse_other(what: str, old: dict, new: dict) -> None:
    """Raise OtherConfiguration where two sets of settings differ, with what each has. what: begins the message."""
    old, new = json.loads(json.dumps([old, new], default=str))  # a tuple comes back from a file as a list
    changed = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    if changed:
        lines = [f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in changed]
        raise OtherConfiguration("\n".join([f"{what}; use the same or another --output", *lines]))


def refuse_newer(where: object, version: int) -> None:
    """Raise NewerRun for columns of a version that this raypipe does not know. where: begins the message."""
    if version > schema.VERSION:
        raise NewerRun(f"{where}: made by a newer raypipe (schema {version}, known is {schema.VERSION}); update it")


def version_of(stored: pa.Schema) -> int:
    """The version of a part's columns. Raises ValueError for one that is no number."""
    return int((stored.metadata or {}).get(b"raypipe.schema", schema.VERSION))


def parsed(content: bytes) -> dict:
    """What run.json holds, or a part repeats of it. Raises ValueError, KeyError or TypeError."""
    found = {"table": "masks"} | json.loads(content)  # the first versions do not say
    return {name: found[name] for name in ("schema", "method", "table", "settings", "provenance")}
