"""Where files are, on any file system: locations, whole files and parts of them, folders, locks.

Knows no run and no image: any room may use it. Never imports another room.
"""

from raypipe.storage.files import (
    check_reader,
    check_size,
    fetch_error,
    map_ahead,
    missing,
    patiently,
    read_bytes,
    resolve,
)
from raypipe.storage.folder import TEMPORARY, Folder, is_local, put, put_at
from raypipe.storage.lock import Locked, fence, hold, live_attempt
from raypipe.storage.parquet import GROUP_ROWS, open_table, parquet_bytes, parquet_options, read_footer
from raypipe.storage.sorted import SortedSet
from raypipe.storage.spool import Spool, portions
from raypipe.storage.temporary import temporary_space
from raypipe.storage.uri import Location, absolute, as_text, join, local_path, locate, normalise, split, without_secrets
from raypipe.storage.web import leads_outside
