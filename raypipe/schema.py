"""The columns of raypipe's tables. Explicit, never inferred: a part in which every image failed has the same types."""

import pyarrow as pa

VERSION = 1  # new columns only at the end; readers accept older versions

# One line per input image: what to label and how to reach its bytes.
MANIFEST = pa.schema(
    [
        ("image_id", pa.string()),  # hash of the absolute normalised URI (plus member or row)
        ("uri", pa.string()),  # for people: without user info and query; `#member` or `#row` for a part of a file
        ("key", pa.string()),  # path relative to the input; what labels, exports and other runs match on
        ("location", pa.string()),  # for machines: the path or full URI to open
        ("start", pa.int64()),  # byte range of a tar member; null = the whole file
        ("length", pa.int64()),
        ("row", pa.int64()),  # row of a Parquet file whose `column` holds the encoded bytes; null = not a table
        ("column", pa.string()),
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
    ]
)

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

# `raypipe evaluate --task pattern`: one row per image of the run. Counts and ratios are null unless status is "ok".
PATTERN = pa.schema(
    [
        ("image_id", pa.string()),
        ("key", pa.string()),
        ("group", pa.string()),
        ("method", pa.string()),
        ("reference", pa.string()),  # the folder of labels
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("tp_fixed", pa.int64()),  # pixels; fixed polarity: segment 0 is the pattern
        ("fp_fixed", pa.int64()),
        ("fn_fixed", pa.int64()),
        ("tn_fixed", pa.int64()),
        ("tp_best", pa.int64()),  # best polarity: `segment` with `sign` is the pattern
        ("fp_best", pa.int64()),
        ("fn_best", pa.int64()),
        ("tn_best", pa.int64()),
        ("segment", pa.int32()),
        ("sign", pa.int8()),  # 1 = the segment itself, -1 = the rest of the foreground
        ("dice_fixed", pa.float64()),
        ("dice_best", pa.float64()),
        ("iou_fixed", pa.float64()),
        ("iou_best", pa.float64()),
        ("status", pa.string()),  # ok, failed (an error row), no_label, other_size, or bad_label
    ],
    metadata={"raypipe.schema": str(VERSION)},
)

# `raypipe agree`: one row per image of any of the runs, in no order. The file's metadata lists them as `raypipe.runs`.
AGREEMENT = pa.schema(
    [
        ("image_id", pa.string()),  # in the first run that has the image
        ("key", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("agreement", pa.float64()),  # mean IoU over all pairs of runs; null unless status is "ok"
        ("nearest", pa.string()),  # the run with the highest mean IoU, the first among equals; null for two runs
        ("ious", pa.list_(pa.float64())),  # of each run, its mean IoU with the others
        ("signs", pa.list_(pa.int8())),  # of each run: 1 = its first mask, -1 = the rest of the foregrounds
        ("status", pa.string()),  # ok, or what keeps the image from being compared: `missing: RUN`, `failed: RUN`, ...
    ],
    metadata={"raypipe.schema": str(VERSION)},
)
