"""Camtrap DP 1.0: a data package of camera trap photographs, an observation for each segment, and mask files."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime

import numpy as np

from raypipe import formats, images, masks, storage
from raypipe.export.about import FORMULA, About, csv_line
from raypipe.export.formats.coco import EMPTY
from raypipe.export.formats.megadetector import CLIPPED
from raypipe.export.target import Target
from raypipe.inputs.originals import portable
from raypipe.run import provenance
from raypipe.types import BadImage

OPTIONS = ("deployments",)
SCHEMAS = "https://raw.githubusercontent.com/tdwg/camtrap-dp/1.0.2/{}"
DEPLOYMENTS = (
    "deploymentID locationID locationName latitude longitude coordinateUncertainty deploymentStart deploymentEnd "
    "setupBy cameraID cameraModel cameraDelay cameraHeight cameraDepth cameraTilt cameraHeading detectionDistance "
    "timestampIssues baitUse featureType habitat deploymentGroups deploymentTags deploymentComments"
).split()
NEEDED = ("deploymentID", "latitude", "longitude", "deploymentStart", "deploymentEnd")
MEDIA = (
    "mediaID deploymentID captureMethod timestamp filePath filePublic fileName fileMediatype exifData favorite "
    "mediaComments"
).split()
OBSERVATIONS = (
    "observationID deploymentID mediaID eventID eventStart eventEnd observationLevel observationType cameraSetupType "
    "scientificName count lifeStage sex behavior individualID individualPositionRadius individualPositionAngle "
    "individualSpeed bboxX bboxY bboxWidth bboxHeight classificationMethod classifiedBy classificationTimestamp "
    "classificationProbability observationTags observationComments"
).split()
KINDS = {"animal": "animal", "human": "human", "person": "human", "vehicle": "vehicle"}  # names that say a type
EXIF, TAKEN, ZONE = 0x8769, 36867, 36881  # the EXIF directory, DateTimeOriginal, OffsetTimeOriginal (Exif 2.31)
MAX_BYTES = 1 << 26  # of the table of deployments
TO_CORRECT = (
    "package whose project nobody described: correct samplingDesign, captureMethod and contributors in datapackage.json"
)


def choose(rows: Iterator[dict], about: About, *, deployments: str | None = None, **_) -> Iterator[dict]:
    """Rows with their `deployment`: the one whose ID is a folder of the key, the innermost; None without one.

    Raises ValueError at once for a table that is missing or damaged.
    """
    if deployments is None:
        example = "deploymentID, latitude, longitude, deploymentStart and deploymentEnd"
        raise ValueError(f"--format camtrapdp needs --deployments FILE: a CSV table with {example}")
    known = {each["deploymentID"]: each for each in read_deployments(deployments)}

    def of(key: str) -> dict | None:
        return next((known[name] for name in reversed(key.split("/")[:-1]) if name in known), None)

    return (row | {"deployment": of(row["key"])} for row in rows)


def photograph(row: dict, content: bytes) -> tuple[bytes, str, str]:
    """The original for every reader, its suffix, and when it was taken: ISO 8601 with the time zone.

    The zone is that of the photograph or, if it names none, of its deployment's start. Raises BadImage without a
    deployment or a time, which no photograph of a package may lack.
    """
    if row["deployment"] is None:
        raise BadImage("export", "no deployment", f"no folder of {row['key']!r} is a deploymentID of --deployments")
    try:
        exif = images.READERS[formats.identify(content)[0]](io.BytesIO(content)).getexif().get_ifd(EXIF)
        taken = datetime.strptime(exif[TAKEN], "%Y:%m:%d %H:%M:%S")
    except Exception:  # no EXIF, or in ruins
        raise BadImage("export", "no time", f"{row['uri']} does not say when it was taken (DateTimeOriginal)") from None
    zone = datetime.fromisoformat(row["deployment"]["deploymentStart"]).tzinfo
    try:
        zone = datetime.strptime(exif[ZONE].strip(), "%z").tzinfo
    except (KeyError, ValueError, AttributeError):  # few cameras write it
        pass
    return *portable(row, content), taken.replace(tzinfo=zone).isoformat()


ORIGINALS, CATEGORIES = photograph, True


def write(rows: Iterator[dict], target: Target, about: About, *, deployments: str, **_) -> Counter:
    """Write media/, masks/ with a PNG per segment (255 inside), three tables, streamed, and datapackage.json.

    An observation has the segment's box, its score as probability, and as `observationTags` its name and the path of
    its mask: `category:NAME | mask:PATH`. It is an animal, a human or a vehicle where the name says just that, else
    unclassified. Images without segments have no observation: a method that finds nothing has not seen that nobody is
    there. Masks without pixels, soft masks and embeddings are left out. What a run does not know of the project is
    filled with the least that the standard takes, and the command says so.
    """
    known, remarks = read_deployments(deployments), Counter({TO_CORRECT: 1})
    target.put(_table(DEPLOYMENTS, known), "deployments.csv")
    with ExitStack() as stack:
        media, observations = (stack.enter_context(target.stream(f"{name}.csv")) for name in ("media", "observations"))
        media.write(csv_line(MEDIA))
        observations.write(csv_line(OBSERVATIONS))
        for row in rows:
            row = row | {"key": row["key"].replace("..", "__").replace("|", "_")}  # neither is allowed in a path
            media.write(csv_line(map(_medium(row, target).get, MEDIA)))
            found = [segment for segment in row["segments"] if segment["area"]]
            remarks[EMPTY] += len(row["segments"]) - len(found)
            for segment in found:
                cells = _observation(row, segment, target, about, remarks)
                observations.write(csv_line(map(cells.get, OBSERVATIONS)))
    target.put(json.dumps(_package(known, about), indent=1, default=str).encode(), "datapackage.json")
    return remarks


def read_deployments(uri: str) -> list[dict]:
    """The rows of a table of deployments by its columns. Raises ValueError that says what is missing or wrong."""
    try:
        text = storage.read_bytes(uri, max_bytes=MAX_BYTES).decode("utf-8-sig")
    except (BadImage, UnicodeDecodeError) as error:
        raise ValueError(f"--deployments {uri!r} cannot be read: {error}") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if unknown := [column for column in reader.fieldnames or () if column not in DEPLOYMENTS]:
        raise ValueError(f"--deployments {uri!r}: {unknown[0]!r} is no column of Camtrap DP's deployments")
    found = list(reader)
    for number, row in enumerate(found, 2):
        try:
            _check(row)
        except ValueError as error:
            raise ValueError(f"--deployments {uri!r}, row {number}: {error}") from None
    if not found or len({row["deploymentID"] for row in found}) < len(found):
        raise ValueError(f"--deployments {uri!r} has no row, or two with the same deploymentID")
    return found


def _check(row: dict) -> None:
    if missing := [name for name in NEEDED if not row.get(name)]:
        raise ValueError(f"{missing[0]} is missing")
    if None in row:
        raise ValueError("there are more cells than columns")
    if row["deploymentID"].startswith(FORMULA):
        raise ValueError(f"deploymentID {row['deploymentID']!r} begins as a formula does, which spreadsheets would run")
    if not (abs(float(row["latitude"])) <= 90 and abs(float(row["longitude"])) <= 180):
        raise ValueError("latitude and longitude must be degrees within 90 and 180")
    for name in ("deploymentStart", "deploymentEnd"):
        try:
            datetime.strptime(row[name], "%Y-%m-%dT%H:%M:%S%z")
        except ValueError:
            example = "2020-03-01T22:00:00Z"
            raise ValueError(f"{name} must be a time with its zone such as {example}, got {row[name]!r}") from None


def _table(columns: list[str], rows: list[dict]) -> bytes:
    """A CSV file of texts that came as CSV: as they are, negative numbers included."""
    writer = csv.DictWriter(buffer := io.StringIO(newline=""), columns)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def _medium(row: dict, target: Target) -> dict:
    content, suffix, taken = row["picture"]
    path = target.name(row, suffix, folder="media")
    target.put(content, path)
    return {
        "mediaID": row["image_id"],
        "deploymentID": row["deployment"]["deploymentID"],
        "timestamp": taken,
        "filePath": path,
        "filePublic": "false",
        "fileName": row["key"].rpartition("/")[2],
        "fileMediatype": "image/jpeg" if suffix == ".jpg" else "image/png",
        "mediaComments": row["note"],
    }


def _observation(row: dict, segment: dict, target: Target, about: About, remarks: Counter) -> dict:
    path = target.name(row, f"_{segment['segment']}.png", folder="masks")
    target.put(images.encode_png(masks.decode_rle(segment) * np.uint8(255)), path)
    (x, y, width, height), name, score = segment["bbox"], about.name(segment), segment["score"]
    remarks[CLIPPED] += not (score is None or 0 <= score <= 1)
    tag = " ".join(name.replace("|", "/").split())
    return {
        "observationID": f"{row['image_id']}-{segment['segment']}",
        "deploymentID": row["deployment"]["deploymentID"],
        "mediaID": row["image_id"],
        "eventStart": row["picture"][2],
        "eventEnd": row["picture"][2],
        "observationLevel": "media",
        "observationType": KINDS.get(name.strip().lower(), "unclassified"),
        "bboxX": x / row["width"],
        "bboxY": y / row["height"],
        "bboxWidth": width / row["width"],
        "bboxHeight": height / row["height"],
        "classificationMethod": "machine",
        "classifiedBy": about.text(),
        "classificationTimestamp": about.provenance["time"],
        "classificationProbability": None if score is None else min(1.0, max(0.0, score)),
        "observationTags": f"category:{tag} | mask:{path}",
    }


def _package(deployments: list[dict], about: About) -> dict:
    latitudes, longitudes = ([float(each[name]) for each in deployments] for name in ("latitude", "longitude"))
    west, east, south, north = min(longitudes), max(longitudes), min(latitudes), max(latitudes)
    corners = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    first, last = (sorted(each[name][:10] for each in deployments) for name in ("deploymentStart", "deploymentEnd"))
    return {
        "resources": [_resource(name) for name in ("deployments", "media", "observations")],
        "profile": SCHEMAS.format("camtrap-dp-profile.json"),
        "name": f"raypipe-{about.method}".replace("_", "-"),
        "created": provenance.now(),
        "description": about.text(),
        "contributors": [{"title": "raypipe", "role": "contributor"}],
        "project": {
            "title": "camera trap photographs",
            "samplingDesign": "opportunistic",
            "captureMethod": ["activityDetection"],
            "individualAnimals": False,
            "observationLevel": ["media"],
        },
        "spatial": {"type": "Polygon", "coordinates": [corners]},
        "temporal": {"start": first[0], "end": last[-1]},
        "taxonomic": [],
    }


def _resource(name: str) -> dict:
    return {
        "name": name,
        "path": f"{name}.csv",
        "profile": "tabular-data-resource",
        "format": "csv",
        "mediatype": "text/csv",
        "encoding": "utf-8",
        "schema": SCHEMAS.format(f"{name}-table-schema.json"),
    }
