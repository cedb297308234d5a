"""What the entries of a list or table mean: files, by the name that they have on this disk, and what is elsewhere."""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from urllib.parse import unquote

from raypipe import storage
from raypipe.inputs import folders
from raypipe.inputs.items import Item, Unusable
from raypipe.storage import Location

ODD = re.compile(r"""[^\x20-\x7e]|[%\\"']|\s-?\d+$""")  # a name with one of these may be spelled otherwise on the disk
NUMBER = re.compile(r"\s+-?\d+$")  # of a class, behind a name
DRIVE = re.compile(r"[A-Za-z]:[\\/]+")
QUOTES = "\"'"
ENDPOINT = re.compile(r"endpoint_override=(?:https?://)?([^/&]+)")


class Addresses:
    """The entries of one list or table as rows."""

    def __init__(self, source: Location, *, allow_private: bool = False):
        """source: the list or table. allow_private: its entries may lead into the machine's own network and disk."""
        self._source, self._home = source, storage.split(source)
        self._allow_private, self._names = allow_private, {}
        # Whoever gives a list inside a network by its address means what lies beside it.
        is_inside = self._home and self._home.is_web and not storage.leads_outside(self._home.host)
        self._own_host = self._home.host if is_inside else None

    def item(self, entry: str) -> Item:
        """The row of a file. Its key depends on nothing but the entry.

        The key of a relative entry is the entry itself, normalised and without leading `..`; that of an absolute path
        is the path, that of a URI host or bucket and path: no scheme, no credentials, no query of a web address. A file
        that is not there by this name is looked for with `/` for `\\`, without quotes or a number behind it, and under
        a name of another Unicode form or percent quoting, if one file has it.
        Raises Unusable for what a list may not lead to, and ValueError where what reads the scheme is not installed.
        """
        text, location = self._meant(entry)
        there = storage.split(location)
        if not self._allow_private and (reason := self._goes_astray(text, location)):
            raise Unusable(f"record{{s}} {reason}: --allow-private permits it")
        storage.check_reader(location)
        is_public = there is not None and not self._allow_private and there.host != self._own_host
        return Item(location, storage.as_text(_key(text)), public=is_public)

    def _goes_astray(self, entry: str, location: Location) -> str:
        """Where an entry leads that its list may not lead to; "" when there is nothing wrong."""
        home, there, own = self._home, storage.split(location), storage.split(entry)
        if there is None:  # a bucket's list may name a shared mount
            is_here = home and (home.is_web or entry.lower().startswith("file:"))
        else:
            is_here = home and (there.scheme == "local" or (not there.is_web and "::" in location))
        if is_here:
            return "of a list from elsewhere that lead to files here"
        if own is None or own.is_web:
            return ""
        endpoint = ENDPOINT.search(unquote(own.options))  # no other scheme looks where it leads
        is_private = "::http" in entry.lower() or (endpoint and not storage.leads_outside(endpoint[1]))
        return "that may lead into a private network" if is_private else ""

    def finds(self, entry: str) -> bool:
        """Whether there is a file; of what has a scheme it is taken for granted."""
        return storage.split(entry) is not None or _is_file(self._meant(entry)[1])

    def _meant(self, entry: str) -> tuple[str, Location]:
        """An entry as it is spelled where the file is, and the file's location."""
        spellings = dict.fromkeys(_spellings(entry, is_local=self._home is None)) if ODD.search(entry) else [entry]
        pairs = [(text, storage.locate(self._source, text)) for text in spellings]
        is_local = storage.split(pairs[-1][1]) is None
        if not ODD.search(entry) or (len(pairs) == 1 and not is_local):
            return pairs[-1]
        for text, location in pairs:
            if _is_file(location):
                return text, location
        for text, location in pairs if is_local else []:
            if path := self._under_another_name(location):
                return text, Location(storage.normalise(path))
        return pairs[-1]

    def _under_another_name(self, location: Location) -> str | None:
        """The one local file whose path differs only in Unicode form and percent quoting."""
        path = "/"
        for name in storage.local_path(location).split("/")[1:]:
            there = os.path.join(path, name)
            if not os.path.lexists(there):
                found = self._names_in(path).get(_form(name), [])
                if len(found) != 1:
                    return None
                there = os.path.join(path, found[0])
            path = there
        return path

    def _names_in(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._names:
            by_form = self._names[folder] = defaultdict(list)
            with contextlib.suppress(OSError):  # nothing is found in it
                for name in os.listdir(folder):
                    by_form[_form(name)].append(name)
        return self._names[folder]


def _spellings(entry: str, *, is_local: bool) -> Iterator[str]:
    """What an entry may mean; all but the last only if there is such a file."""
    plain = entry[1:-1] if len(entry) > 2 and entry[0] in QUOTES and entry[0] == entry[-1] else entry
    if storage.split(plain):
        yield plain
        return
    yield entry
    yield plain
    if is_local:
        with contextlib.suppress(UnicodeEncodeError):
            yield os.fsdecode(plain.encode("cp1252"))  # as an old disk has the bytes of such a list
        yield NUMBER.sub("", plain)
    yield plain if plain.startswith("\\\\") else plain.replace("\\", "/")


def _is_file(location: Location) -> bool:
    try:
        return folders.kind(location) == "file"
    except (OSError, ValueError):
        return False


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(name))


def _key(text: str) -> str:
    if storage.split(text) is not None:
        return Location(text).partition("://")[2]
    if text.lower().startswith(("/", "file://")):
        return storage.local_path(text).lstrip("/")
    if DRIVE.match(text) or text.startswith("\\\\"):
        text = DRIVE.sub("", text, count=1).replace("\\", "/").lstrip("/")
    return re.sub(r"^(\.\./)+", "", posixpath.normpath(text))
