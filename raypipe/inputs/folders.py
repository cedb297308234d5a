"""Which files a folder or a glob holds, on any file system."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

from pyarrow import fs as pafs

from raypipe import storage

WILDCARD = re.compile(r"[*?\[]")


def kind(uri: str) -> str:
    """`file`, `folder`, `other` (FIFO, device, socket) or `missing`. A web address counts as a file without asking.

    Raises OSError when it cannot be reached or asked.
    """
    parts = storage.split(uri)
    if parts is None:
        try:
            mode = os.stat(storage.local_path(uri)).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return "missing"
        return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"
    if parts.is_web:
        return "file"
    filesystem, path = storage.resolve(uri)
    names = {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}
    return names.get(filesystem.get_file_info(path).type, "missing")


def walk(
    uri: str, skipped: Counter, *, hidden: tuple[str, ...] = (".", "_"), enter: Callable[[str], bool] = bool
) -> Iterator[str]:
    """Relative paths of the regular files beneath a folder, in the order of the paths as text.

    Names that begin with one of `hidden` are left out, with all beneath them. enter(relative folder) decides about
    local sub-folders. Links to files are followed; links to folders too, unless they lead back into the folder or to
    one that was already seen, so that loops end. `skipped` counts what was left out. Raises OSError.
    """
    path = storage.local_path(uri)
    return _walk_remote(uri, skipped, hidden) if path is None else _walk_local(path, skipped, hidden, enter)


def _walk_local(root: str, skipped: Counter, hidden: tuple[str, ...], enter: Callable[[str], bool]) -> Iterator[str]:
    home, linked, stack = os.path.realpath(root), set(), [_entries(root, "", skipped, hidden)]
    while stack:
        relative = next(stack[-1], None)
        if relative is None:
            stack.pop()
        elif not relative.endswith("/"):
            yield relative
        elif enter(relative[:-1]):
            real = os.path.realpath(os.path.join(root, relative))
            if real != os.path.join(home, relative[:-1]):  # reached through a link
                if real in linked or f"{real}/".startswith(f"{home}/"):
                    skipped["links to folders listed elsewhere"] += 1
                    continue
                linked.add(real)
            stack.append(_entries(root, relative, skipped, hidden))


def _entries(root: str, relative: str, skipped: Counter, hidden: tuple[str, ...]) -> Iterator[str]:
    """Sorted relative paths of what a folder holds; those of folders end in `/`, which also sorts them as paths."""
    names = []
    try:
        with os.scandir(os.path.join(root, relative)) as entries:
            for entry in entries:
                if entry.name.startswith(hidden):
                    skipped["hidden names"] += 1
                elif entry.is_dir():
                    names.append(f"{relative}{entry.name}/")
                elif entry.is_file():
                    names.append(relative + entry.name)
                else:
                    skipped["broken links and special files"] += 1
    except OSError:
        if not relative:
            raise
        skipped["unreadable folders"] += 1
    return iter(sorted(names))


def _walk_remote(uri: str, skipped: Counter, hidden: tuple[str, ...]) -> Iterator[str]:
    filesystem, base = storage.resolve(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
    start = len(base.strip("/")) + 1
    names = sorted(info.path.strip("/")[start:] for info in infos if info.type == pafs.FileType.File)
    del infos  # a million of them are several hundred MB
    for name in names:
        if any(part.startswith(hidden) for part in name.split("/")):
            skipped["hidden names"] += 1
        else:
            yield name


def glob(pattern: str, skipped: Counter) -> tuple[str, Iterator[str]]:
    """The folder before the first wildcard, and the relative paths of all files beneath it that match.

    `*`, `?` and `[abc]`, `[!abc]` stay within a name, `**` stands for any folders. Names with a leading dot match
    only a pattern with one. Raises OSError.
    """
    parts = storage.split(pattern)
    names = (storage.local_path(pattern) if parts is None else parts.key).split("/")
    first = next(i for i, name in enumerate(names) if WILDCARD.search(name))
    fixed, patterns = "/".join(names[:first]), names[first:]
    folder = (fixed or "/") if parts is None else parts.at(fixed)
    hidden = () if any(name.startswith(".") for name in patterns) else (".",)

    def enter(relative: str) -> bool:
        names = relative.split("/")
        if "**" not in patterns and len(names) >= len(patterns):
            return False
        fixed_depth = patterns[: patterns.index("**")] if "**" in patterns else patterns
        return all(fnmatchcase(name, wanted) for name, wanted in zip(names, fixed_depth, strict=False))

    found = walk(folder, skipped, hidden=hidden, enter=enter) if kind(folder) == "folder" else iter(())
    return folder, (name for name in found if _matches(name.split("/"), patterns))


def _matches(names: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[i:], patterns[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
