"""The columns of raypipe's tables. Explicit, never inferred: a part in which every image failed has the same types."""

from collections.abc import Sequence

import pyarrow as pa

VERSION = 3  # new columns only at the end; readers accept older versions

# One line per input image: what to label and how to reach its bytes.
MANIFEST = pa.schema(
    [
        ("image_id", pa.string()),  # hash of the absolute normalised URI (plus member or row)
        ("uri", pa.string()),  # for people: without user info and query; `#member` or `#row` for a part of a file
        ("key", pa.string()),  # path relative to the input; what labels, exports and other runs match on
        ("location", pa.string()),  # for machines: the path or full URI to open
        ("start", pa.int64()),  # byte range of a tar member; null = the whole file. With a row: which of its pictures
        ("length", pa.int64()),
        ("row", pa.int64()),  # row of a Parquet file whose `column` holds the picture; null = not a table
        ("column", pa.string()),  # without a row, but with a range: `base64`, as the range holds text
        ("public", pa.bool_()),  # comes from a list: may lead to public addresses of the web alone
    ]
)

RLE = pa.struct([("size", pa.list_(pa.int32(), 2)), ("counts", pa.string())])  # COCO: [height, width], column-major

SEGMENT = pa.struct(
    [
        ("size", pa.list_(pa.int32(), 2)),
        ("counts", pa.string()),
        ("bbox", pa.list_(pa.float32(), 4)),  # [x, y, width, height] in pixels
        ("area", pa.int64()),  # pixels
        ("score", pa.float32()),  # null when the method has none
        ("label", pa.string()),  # null when the method names nothing
        ("soft", pa.binary()),  # with --keep-soft: 16-bit grey PNG, 65535 = probability 1
        ("embedding", pa.list_(pa.float16())),  # with --keep-embeddings, not normalised; since version 2
        ("stability", pa.float32()),  # with --jitter: mean IoU over the views, 0..1; since version 3
    ]
)
SINCE = {"embedding": 2, "stability": 3}  # the version that a field of a segment came with; the others were there
LARGE = ("soft", "embedding")  # fields of a segment that readers leave on the disk unless they are asked for

# One row per input image, failed or not.
MASKS = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("key", pa.string()),
        ("sha256", pa.string()),  # of the encoded file; "" when it could not be read
        ("height", pa.int32()),  # after EXIF rotation; 0 when unknown
        ("width", pa.int32()),
        ("segments", pa.list_(SEGMENT)),
        ("foreground", RLE),  # null without one
        ("note", pa.string()),
        ("seconds", pa.float64()),  # time in the segmenter
        ("attempt", pa.string()),
        ("error", pa.string()),  # "" = good; else `stage: kind: text`
    ],
    metadata={"raypipe.schema": str(VERSION)},
)


def _embeddings(kind: pa.DataType) -> pa.Schema:
    """One row per image of a corpus, failed or not. kind: of the embedding's values."""
    own = {
        "segments": pa.field("embedding", pa.list_(kind)),  # a unit vector of D values; null in error rows
        "foreground": pa.field("phash", pa.uint64()),  # of what the image looks like; null in error rows
    }
    return pa.schema([own.get(field.name, field) for field in MASKS], metadata=MASKS.metadata)


# The kinds of run: what its folder of parts is called, and their columns.
TABLES = {
    "masks": MASKS,
    "embeddings": _embeddings(pa.float16()),
    "exact_embeddings": _embeddings(pa.float32()),
}


def as_of(version: int, columns: pa.Schema) -> pa.Schema:
    """The columns of a table as a version of raypipe had them: what a part that it wrote has."""
    return with_leaves(columns, [name for name in SEGMENT.names if SINCE.get(name, 1) <= version])


def with_leaves(columns: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """The columns of a table with only some fields of a segment."""
    stored, kept = pa.list_(SEGMENT), pa.list_(pa.struct([field for field in SEGMENT if field.name in names]))
    fields = [field.with_type(kept) if field.type == stored else field for field in columns]
    return pa.schema(fields, metadata=columns.metadata)


COMMIT = pa.schema([("image_id", pa.string()), ("error", pa.string())])

# The failed images of a run, for people; rewritten whenever a run ends.
ERRORS = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("key", pa.string()),
        ("stage", pa.string()),
        ("kind", pa.string()),
        ("message", pa.string()),
        ("retryable", pa.bool_()),  # the same file may succeed another time
    ]
)
