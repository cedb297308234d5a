"""A checksum inside a Parquet file, where readers do not look: that of a commit record, for which no other speaks."""

from __future__ import annotations

import hashlib

SEAL = b"raypipe:"  # stands before the checksum


def seal(content: bytes) -> bytes:
    """A Parquet file with its own sha256 before the footer, where readers do not look: every flipped byte shows."""
    footer = _footer(content)
    return content[:footer] + SEAL + hashlib.sha256(content).digest() + content[footer:]


def is_sealed(content: bytes) -> bool | None:
    """Whether a file is as `seal` left it; None when it has no checksum, as in runs of the first versions."""
    footer = _footer(content)
    start = footer - len(SEAL) - hashlib.sha256().digest_size
    if start < 0 or not content.startswith(SEAL, start):
        return None
    return hashlib.sha256(content[:start] + content[footer:]).digest() == content[start + len(SEAL) : footer]


def _footer(content: bytes) -> int:
    """Where a Parquet file's footer begins; it ends with its length (4 bytes) and PAR1."""
    return len(content) - 8 - int.from_bytes(content[-8:-4], "little")
