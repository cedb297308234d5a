"""Places where files are, on any file system: locations, whole files and parts of them, folders, locks.

Knows no run and no image: any room may use it. Never imports another room.
"""

from raypipe.storage.files import (
    ARROW_SCHEMES,
    SCHEME,
    WEB_SCHEMES,
    absolute,
    as_path,
    as_text,
    cannot_write,
    fetch_error,
    is_local,
    is_text,
    join,
    local_path,
    local_uri,
    locate,
    normalise,
    patiently,
    put,
    read_bytes,
    redact,
    resolve,
    split,
)

__all__ = [
    "ARROW_SCHEMES",
    "SCHEME",
    "WEB_SCHEMES",
    "absolute",
    "as_path",
    "as_text",
    "cannot_write",
    "fetch_error",
    "is_local",
    "is_text",
    "join",
    "local_path",
    "local_uri",
    "locate",
    "normalise",
    "patiently",
    "put",
    "read_bytes",
    "redact",
    "resolve",
    "split",
]
