"""Locations as text: local paths and URIs, taken apart, joined, normalised and shown without secrets."""

from __future__ import annotations

import os
import posixpath
import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote_from_bytes, unquote_to_bytes

ARROW_SCHEMES = {  # and the name of what reads them in pyarrow.fs
    "s3": "S3FileSystem",
    **dict.fromkeys(("gs", "gcs"), "GcsFileSystem"),
    **dict.fromkeys(("hdfs", "viewfs"), "HadoopFileSystem"),
    **dict.fromkeys(("abfs", "abfss"), "AzureFileSystem"),
}
WEB_SCHEMES = {"http", "https"}
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what `ray job submit` starts
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)  # two letters or more: C:\ is a Windows drive
# What pyarrow takes behind a `?`. Any other `?` belongs to the object's key.
OPTION = (
    r"(?:endpoint_override|region|scheme|allow_bucket_creation|allow_bucket_deletion|tls_ca_file_path|"
    r"tls_verify_certificates|force_virtual_addressing|project_id|retry_limit_seconds|user|replication|buffer_size|"
    r"kerb_ticket|blob_storage_authority|dfs_storage_authority|blob_storage_scheme|dfs_storage_scheme|"
    r"enable_tls|credential_kind|tenant_id|client_id|client_secret)=[^&?]*"
)
OPTIONS = re.compile(rf"{OPTION}(?:&{OPTION})*")


class Parts(NamedTuple):
    """A remote URI taken apart without decoding anything: keys from a listing are raw."""

    scheme: str
    user: str  # before the @: credentials; for abfs the container
    host: str  # host or bucket
    key: str
    options: str  # for pyarrow, without the `?`

    @property
    def is_web(self) -> bool:
        """Whether it is read by HTTP."""
        return self.scheme in WEB_SCHEMES

    @property
    def root(self) -> str:
        """The URI up to the key, without a slash at its end."""
        return f"{self.scheme}://{self.user}@{self.host}" if self.user else f"{self.scheme}://{self.host}"

    def at(self, key: str) -> str:
        """The URI of another key at the same place."""
        return f"{self.root}/{key}" + (f"?{self.options}" if self.options else "")


class Location(str):
    """Where a file or a folder is. As text it holds no secret; `uri` is what opens it.

    Every function of this room that takes a URI takes a Location too, and two are equal if their `uri` is. So code that
    prints, logs or stores one cannot leak credentials or signed queries, and code that hands it to another library has
    to ask for the `uri`.
    """

    uri: str

    def __new__(cls, uri: str) -> Location:
        if isinstance(uri, Location):
            return uri
        parts, shown = split(uri), normalise(uri)
        is_web = parts is not None and parts.scheme not in ARROW_SCHEMES
        self = super().__new__(cls, shown.partition("?")[0] if is_web else shown)  # queries may be secrets too
        self.uri = uri
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.uri == _full(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.uri)

    def __reduce__(self) -> tuple:
        return Location, (self.uri,)


def split(uri: str) -> Parts | None:
    """The parts of a remote URI; None for a local path or file:// URI."""
    return _split(_full(uri))


@lru_cache(maxsize=256)  # a listing asks a dozen times about each of its images
def _split(uri: str) -> Parts | None:
    match = SCHEME.match(uri)
    if not match or match[1].lower() == "file":
        return None
    scheme, rest, options = match[1].lower(), match[2], ""
    head, _, tail = rest.rpartition("?")
    if scheme in ARROW_SCHEMES and head and OPTIONS.fullmatch(tail):
        rest, options = head, tail
    authority, _, key = rest.partition("/")
    user, _, host = authority.rpartition("@")
    return Parts(scheme, user, host, key, options)


def local_path(uri: str) -> str | None:
    """The absolute path of a local file (links are not resolved); None for a remote URI.

    Raises ValueError for a relative path in a submitted job: it would lie in a folder that Ray deletes.
    """
    if split(uri) is not None:
        return None
    match = SCHEME.match(uri := _full(uri))
    if match:
        return os.path.abspath(os.fsdecode(unquote_to_bytes("/" + match[2].partition("/")[2])))
    path = os.path.expanduser(uri)
    if not os.path.isabs(path) and SUBMITTED in os.environ:
        where = f"a submitted job runs in {os.getcwd()}, which Ray deletes"
        raise ValueError(f"the path {uri!r} is relative, but {where}; give an absolute path or a URI")
    return os.path.abspath(path)


def absolute(uri: str) -> str:
    """The same location for processes with another current folder: plain local paths become absolute."""
    uri = _full(uri)
    return uri if SCHEME.match(uri) else local_path(uri)


def as_text(name: str) -> str:
    """A name as a table can hold it: percent-quoted when it is not valid UTF-8, whose surrogates Arrow cannot hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return quote_from_bytes(os.fsencode(name))
    return name


def normalise(uri: str) -> str:
    """The canonical form of a location, whose hash is the id of an image.

    Local: the absolute plain path, or where that is not valid UTF-8 a quoted file:// URI. Remote: scheme://host/key
    without user info and options; the query of an http(s) URL stays, since it may say which image is meant, its
    fragment goes.
    """
    parts = split(uri)
    if parts is None:
        path = local_path(uri)
        text = as_text(path)
        return path if text == path else f"file://{text}"
    key = parts.key.partition("#")[0] if parts.is_web else parts.key
    container = parts.user.partition(":")[0] + "@" if parts.scheme.startswith("abfs") and parts.user else ""
    return f"{parts.scheme}://{container}{parts.host}/{key}"


def join(uri: str, name: str) -> Location:
    """The location of a file beneath a folder's URI; `name` is relative, raw and may contain `..`."""
    parts = split(uri)
    if parts is None:
        return Location(normalise(os.path.join(local_path(uri), name)))
    key = f"{parts.key.rstrip('/')}/{name}".lstrip("/")
    return Location(parts.at(posixpath.normpath(key) if name.startswith(("./", "../")) else key))


def locate(source: str, entry: str) -> Location:
    """The location that an entry of a list or table means; relative ones start at the folder of `source`.

    An entry on the same kind of store takes over credentials and endpoint of the source.
    """
    home, there = split(source), split(entry)
    if there is not None:
        inherits = home and home.options and home.scheme == there.scheme and not (there.user or there.options)
        return Location(there._replace(user=home.user, options=home.options).at(there.key) if inherits else entry)
    if SCHEME.match(entry) or entry.startswith("/"):
        return Location(normalise(entry))
    if home is None:
        return join(os.path.dirname(local_path(source)), entry)
    key = home.key.partition("?")[0] if home.is_web else home.key
    return join(home.at(posixpath.dirname(key)), entry)


def without_secrets(word: str) -> str:
    """A word of the command line, the remote URI at its end (behind `--flag=`, `given:`, ...) without any secret."""
    before, uri = re.fullmatch(r"((?:--?)?(?:[\w-]+=)?(?:[\w,]+:(?!//)){0,2})(.*)", word, re.DOTALL).groups()
    parts = split(uri)
    if parts is None:
        return word
    if parts.scheme not in ARROW_SCHEMES:
        return word if Location(uri) == str(Location(uri)) else before + Location(uri)
    user = parts.user.partition(":")[0] if parts.scheme.startswith("abfs") else ""  # the container, then a secret
    options = "&".join(each for each in parts.options.split("&") if not each.startswith("client_secret="))
    if (user, options) == (parts.user, parts.options):
        return word
    return before + parts._replace(user=user, options=options).at(parts.key)


def _full(uri: str) -> str:
    return uri.uri if isinstance(uri, Location) else uri
