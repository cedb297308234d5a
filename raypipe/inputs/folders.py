"""Which files a folder or a glob holds, on any file system."""

from __future__ import annotations

import itertools
import os
import posixpath
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from pyarrow import fs as pafs

from raypipe import storage

WILDCARD = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)(?:\.\.([1-9]\d*))?|([^{}]*,[^{}]*))\}")  # the innermost ones
MOST_PATHS = 100_000  # that braces may stand for
# What network drives, desktops, phones and cameras put beside photographs. Names with a leading dot are hidden anyway.
MACHINE_FOLDERS = set(
    "@eadir @tmp #recycle #snapshot @recycle @recently-snapshot @__thumb $recycle.bin recycler lost+found "
    "__macosx".split()
) | {"system volume information", "network trash folder", "temporary items", "ipod photo cache"}
LEFTOVERS = re.compile(
    r"(?P<thumbnail>.*\.(thm|lrv|ithmb|lrprev))|icon\r|(ehthumbs|thumbs)\w*\.db.*|desktop\.ini|zbthumbnail\.info"
    r"|pspbrwse\.jbf|.*@syno(eastream|resource)|.*:zone\.identifier|:2e.*",
    re.IGNORECASE | re.DOTALL,
)
RUN, RUN_FOLDERS = "folder{s} of a run of raypipe", {"_commits", "_runs"}


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


def in_other_form(uri: str) -> storage.Location | None:
    """What bears this local name in composed or decomposed Unicode, if nothing bears it as it is."""
    for form in ("NFC", "NFD") if storage.split(uri) is None and kind(uri) == "missing" else ():
        other = unicodedata.normalize(form, storage.Location(uri).uri)
        if kind(other) != "missing":
            return storage.Location(other)
    return None


def walk(
    uri: str, skipped: Counter, *, asked: Sequence[str] = (), enter: Callable[[str], bool] = bool
) -> Iterator[str]:
    """Relative paths of the regular files beneath a folder, in the order of the paths as text.

    Left out, with all beneath them, are hidden names, what machines put beside photographs, and runs of raypipe, but
    for what `asked`, the names in a pattern, asks for. enter(relative folder) decides about local sub-folders. Links to
    files are followed; links to folders too, unless they lead back into the folder or to one that was already seen, so
    that loops end. `skipped` counts what was left out, a folder as one; `{s}` in a reason stands for its plural. Raises
    OSError.
    """
    path = storage.local_path(uri)
    return _walk_remote(uri, skipped, asked) if path is None else _walk_local(path, skipped, asked, enter)


def why_left_out(name: str, asked: Sequence[str] = (), *, is_folder: bool = False) -> str:
    """Why no photograph is looked for in a file or folder of this name; "" where one is."""
    if name.startswith(".") and not any(each.startswith(".") for each in asked):
        if name.endswith(".icloud"):
            return "file{s} that iCloud has not downloaded"
        return "hidden folder{s}" if is_folder else "hidden name{s}"
    if name in asked:
        return ""
    if is_folder:
        return f"folder{{s}} {name}" if name.lower() in MACHINE_FOLDERS else ""
    match = LEFTOVERS.fullmatch(name)
    return "" if match is None else "thumbnail{s} of a camera" if match["thumbnail"] else "leftover{s} of a system"


def _walk_local(root: str, skipped: Counter, asked: Sequence[str], enter: Callable[[str], bool]) -> Iterator[str]:
    home, linked, stack = os.path.realpath(root), set(), [_entries(root, "", skipped, asked)]
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
                    skipped["link{s} to folders listed elsewhere"] += 1
                    continue
                linked.add(real)
            stack.append(_entries(root, relative, skipped, asked))


def _entries(root: str, relative: str, skipped: Counter, asked: Sequence[str]) -> Iterator[str]:
    """Sorted relative paths of what a folder holds; those of folders end in `/`, which also sorts them as paths."""
    names = []
    try:
        with os.scandir(os.path.join(root, relative)) as entries:
            for entry in entries:
                kind = _kind_of(entry)
                if reason := why_left_out(entry.name, asked, is_folder=kind == "folder"):
                    skipped[reason] += 1
                elif kind == "other":
                    skipped["broken link{s} or special file{s}"] += 1
                else:
                    names.append(f"{entry.name}/" if kind == "folder" else entry.name)
    except OSError:
        if not relative:
            raise
        skipped[f"unreadable folder{{s}} {storage.as_text(relative)!r}"] += 1
    if "run.json" in names and (own := {f"{name}/" for name in RUN_FOLDERS}.intersection(names)):
        skipped[RUN] += 1 if relative else len(own)
        names = [] if relative else [name for name in names if name not in own]
    return iter(sorted(relative + name for name in names))


def _kind_of(entry: os.DirEntry) -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:  # a link to itself
        return "other"


def _walk_remote(uri: str, skipped: Counter, asked: Sequence[str]) -> Iterator[str]:
    filesystem, base = storage.resolve(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
    start = len(base.strip("/")) + 1
    names = sorted(info.path.strip("/")[start:] for info in infos if info.type == pafs.FileType.File)
    del infos  # a million of them are several hundred MB
    runs, counted = _runs_among(names), set()
    for name in names:
        parts = name.split("/")
        for depth, part in enumerate(parts, 1):
            path, is_folder = "/".join(parts[:depth]), depth < len(parts)
            if reason := RUN if path in runs else why_left_out(part, asked, is_folder=is_folder):
                skipped[reason] += path not in counted
                counted.add(path)
                break
        else:
            yield name


def _runs_among(names: list[str]) -> set[str]:
    """The folders of runs of raypipe among paths; the own folders of one that is the root."""
    found, homes = set(), {posixpath.dirname(name) for name in names}
    for folder in {posixpath.dirname(name) for name in names if posixpath.basename(name) == "run.json"}:
        own = homes.intersection(posixpath.join(folder, name) for name in RUN_FOLDERS)
        found |= own if not folder else {folder} if own else set()
    return found


def glob(pattern: str, skipped: Counter) -> tuple[str, Iterator[str]]:
    """The folder before the first wildcard or brace, and the relative paths of all files beneath it that match.

    `*`, `?` and `[abc]`, `[!abc]` stay within a name, `**` stands for any folders. Names with a leading dot match only
    a pattern with one. Names match in any Unicode form; `skipped` counts those that match but for their capitals.
    `{00..12}` and `{a,b}` stand for names that must all be there: files, or folders with all beneath them. A local
    folder whose name has such signs itself is meant as it is: `[2024]/*.jpg`. Raises OSError, and ValueError for
    braces that name something missing.
    """
    parts = storage.split(pattern)
    path = storage.local_path(pattern) if parts is None else parts.key
    first = min(match.start() for match in (WILDCARD.search(path), BRACES.search(path)) if match)
    names, depth = path.split("/"), path.count("/", 0, first)
    while parts is None and kind("/".join(names[: depth + 1])) == "folder":
        depth += 1
    folder, rest = "/".join(names[:depth]), "/".join(names[depth:])
    folder = (folder or "/") if parts is None else parts.at(folder)
    folder = in_other_form(folder) or folder
    paths = list(dict.fromkeys(itertools.islice(expand(rest), MOST_PATHS + 1)))
    if len(paths) > MOST_PATHS:
        raise ValueError(f"{storage.Location(pattern)}: braces may stand for at most {MOST_PATHS:,} names")
    plain = [path for path in paths if (parts and parts.is_web) or not WILDCARD.search(path)]
    kinds = dict(zip(plain, storage.map_ahead(lambda path: kind(storage.join(folder, path)), plain), strict=True))
    if missing := [path for path in plain if kinds[path] not in ("file", "folder")]:
        text = f"{len(missing):,} of {len(paths):,} names do not exist, such as {missing[0]!r}"
        raise ValueError(f"{storage.Location(pattern)}: {text}")
    return folder, itertools.chain.from_iterable(_alternative(folder, path, kinds, skipped) for path in paths)


def _alternative(folder: str, path: str, kinds: dict[str, str], skipped: Counter) -> Iterator[str]:
    if kinds.get(path) == "file":
        return iter([path])
    if path in kinds:
        return (f"{path}/{name}" for name in walk(storage.join(folder, path), skipped))
    return _matching(folder, path.split("/"), skipped)


def expand(pattern: str) -> Iterator[str]:
    """What braces stand for, in order: `{08..10}`, `{0..9..3}`, `{a,b}`, also several and nested, as in shells."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, step, choices = match.groups()
    words = choices.split(",") if choices is not None else _numbers(first, last, int(step or 1))
    for word in words:
        yield from expand(pattern[: match.start()] + word + pattern[match.end() :])


def _numbers(first: str, last: str, step: int) -> Iterator[str]:
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    sign = 1 if int(first) <= int(last) else -1
    return (f"{number:0{width}}" for number in range(int(first), int(last) + sign, sign * step))


def _matching(folder: str, patterns: list[str], skipped: Counter) -> Iterator[str]:
    patterns = [unicodedata.normalize("NFC", pattern) for pattern in patterns]
    any_case = [pattern.casefold() for pattern in patterns]

    def enter(relative: str) -> bool:
        names = unicodedata.normalize("NFC", relative).split("/")
        if "**" not in patterns and len(names) >= len(patterns):
            return False
        fixed_depth = patterns[: patterns.index("**")] if "**" in patterns else patterns
        return all(fnmatchcase(name, wanted) for name, wanted in zip(names, fixed_depth, strict=False))

    for name in walk(folder, skipped, asked=patterns, enter=enter) if kind(folder) == "folder" else ():
        names = unicodedata.normalize("NFC", name).split("/")
        if _matches(names, patterns):
            yield name
        elif _matches([each.casefold() for each in names], any_case):
            skipped["name{s} in other capitals than the pattern"] += 1


def _matches(names: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_matches(names[i:], patterns[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
