"""Camtrap DP: tables that fit together and the standard, boxes and mask files that are the masks."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.written import masks_row, random_masks, write_run

from raypipe.cli.verbs import main
from raypipe.export.export import Export, export
from raypipe.export.formats.camtrapdp import DEPLOYMENTS, MEDIA, OBSERVATIONS

TIME = {"type": "datetime", "format": "%Y-%m-%dT%H:%M:%S%z"}
SHARE = {"type": "number", "constraints": {"minimum": 0, "maximum": 1}}
TYPES = {  # what the table schemas of Camtrap DP 1.0 say of columns that are written; the others are texts
    "deploymentStart deploymentEnd timestamp eventStart eventEnd classificationTimestamp": TIME,
    "bboxX bboxY bboxWidth bboxHeight classificationProbability": SHARE,
    "latitude": {"type": "number", "constraints": {"minimum": -90, "maximum": 90}},
    "longitude": {"type": "number", "constraints": {"minimum": -180, "maximum": 180}},
    "filePublic": {"type": "boolean", "constraints": {"required": True}},
    "filePath": {"type": "string", "constraints": {"required": True, "pattern": r"^(?=^[^./~])(^((?!\.{2}).)*$).*$"}},
    "fileMediatype": {"type": "string", "constraints": {"required": True, "pattern": "^(image|video|audio)/.*$"}},
    "observationLevel": {"type": "string", "constraints": {"required": True, "enum": ["media", "event"]}},
    "observationType": {
        "type": "string",
        "constraints": {
            "required": True,
            "enum": ["animal", "human", "vehicle", "blank", "unknown", "unclassified"],
        },
    },
    "classificationMethod": {"type": "string", "constraints": {"enum": ["human", "machine"]}},
}
KEYS = ("south/cam-1/a.jpg", "south/cam-1/x|y..z.jpg", "cam-2/=b.jpg", "cam-2/nothing.jpg", "else/c.jpg", "cam-2/d.jpg")
NAMES = ("animal", "Person", "=red | fox,\n 'x'")


def schema_of(name: str, columns: list[str]) -> dict:
    """A table schema of the standard, as far as it concerns what is written."""
    known = {column: kind for names, kind in TYPES.items() for column in names.split()}
    keys = {"deployments": "deploymentID", "media": "mediaID", "observations": "observationID"}
    links = {"media": ["deployments"], "observations": ["deployments", "media"]}.get(name, [])
    foreign = [{"fields": keys[to], "reference": {"resource": to, "fields": keys[to]}} for to in links]
    fields = [{"name": column} | known.get(column, {"type": "string"}) for column in columns]
    return {"fields": fields, "primaryKey": keys[name], "foreignKeys": foreign}


@pytest.fixture
def made(tmp_path) -> dict[str, np.ndarray]:
    """A run over photographs of two deployments, one elsewhere and one without a time; its masks by key."""
    rng, table, expected = np.random.default_rng(0), [], {}
    for i, key in enumerate(KEYS):
        size, path, exif = (9 + i, 14 - i), tmp_path / f"{i}.jpg", Image.Exif()
        if key != "cam-2/d.jpg":
            exif.get_ifd(0x8769)[36867] = f"2026:01:0{i + 1} 10:20:30"
        if key == "cam-2/=b.jpg":
            exif.get_ifd(0x8769)[36881] = "-07:00"
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path, exif=exif)
        found = np.concatenate([random_masks(rng, size, 3), np.zeros((1, *size), bool)])[: 0 if "nothing" in key else 4]
        sha256, scores = hashlib.sha256(path.read_bytes()).hexdigest(), [0.25, 1.5, 0.5, 0.5][: len(found)]
        names = [*NAMES, "cat"][: len(found)]
        table.append(masks_row(key, found, uri=str(path), sha256=sha256, labels=names, scores=scores))
        expected[key] = found
    table.append(masks_row("cam-2/broken.jpg", np.zeros((0, 1, 1)), error="decode: truncated: it ends early"))
    write_run(str(tmp_path / "run"), table)
    (tmp_path / "deployments.csv").write_text(
        "deploymentID,longitude,latitude,deploymentStart,deploymentEnd,habitat\n"
        'cam-1,-4.5,51,2026-01-01T00:00:00+02:00,2026-01-31T00:00:00+02:00,"moor, wet"\n'
        "cam-2,5,-50.25,2026-01-02T00:00:00Z,2026-02-28T00:00:00Z,\n"
    )
    return expected


def exported(folder: Path, **options) -> Path:
    deployments = str(folder / "deployments.csv")
    export(Export(str(folder / "run"), "camtrapdp", output=str(folder / "out"), deployments=deployments, **options))
    return folder / "out"


def read(out: Path, name: str) -> list[dict]:
    return list(csv.DictReader((out / f"{name}.csv").open(newline="", encoding="utf-8")))


def test_tables_lead_to_photographs_and_exact_masks(made, tmp_path):
    out = exported(tmp_path)
    media = {row["mediaID"]: row for row in read(out, "media")}
    ids = {key: hashlib.md5(key.encode()).hexdigest() for key in KEYS[:4]}
    assert media.keys() == set(ids.values())
    times = {"south/cam-1/a.jpg": "2026-01-01T10:20:30+02:00", "cam-2/=b.jpg": "2026-01-03T10:20:30-07:00"}
    assert {key: media[ids[key]]["timestamp"] for key in times} == times
    for key, each in ids.items():
        rows, found = [row for row in read(out, "observations") if row["mediaID"] == each], made[key]
        assert len(rows) == sum(mask.any() for mask in found)
        with Image.open(out / media[each]["filePath"]) as picture:
            assert picture.size == found.shape[:0:-1] and ".." not in media[each]["filePath"]
        for row, mask, name in zip(rows, found, NAMES, strict=False):
            tags = dict(tag.split(":", 1) for tag in row["observationTags"].split(" | "))
            np.testing.assert_array_equal(np.asarray(Image.open(out / tags["mask"])), mask * np.uint8(255))
            ys, xs = np.nonzero(mask)
            box = xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()
            shares = [float(row[f"bbox{side}"]) for side in ("X", "Y", "Width", "Height")]
            assert shares == pytest.approx([b / s for b, s in zip(box, mask.shape[::-1] * 2, strict=True)])
            assert tags["category"] == " ".join(name.replace("|", "/").split())
            assert row["deploymentID"] == media[each]["deploymentID"] and row["eventStart"] == media[each]["timestamp"]
        kinds = [row["observationType"] for row in rows]
        assert kinds == ["animal", "human", "unclassified"][: len(rows)]


def test_what_no_package_can_hold_is_told(made, tmp_path, capsys):
    words = ["export", str(tmp_path / "run"), "--format", "camtrapdp", "--output", str(tmp_path / "out")]
    assert main(words) == 2 and "needs --deployments FILE" in capsys.readouterr().err
    assert main([*words, "--deployments", str(tmp_path / "deployments.csv")]) == 3
    text = capsys.readouterr().out
    assert "1  original no deployment" in text and "1  original no time" in text and "correct samplingDesign" in text
    assert main(["export", str(tmp_path / "run"), "--format", "coco", "--deployments", "x.csv"]) == 2
    assert "--deployments has no effect: coco has no camera traps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("deploymentID,latitude\na,1", "longitude is missing"),
        ("deploymentID,depth\na,1", "'depth' is no column"),
        ("", "has no row"),
        ("{head}\na,91,0,{time},{time}", "row 2: latitude and longitude must be"),
        ("{head}\na,1,0,{time},2026-01-01T00:00:00", "deploymentEnd must be a time with its zone"),
        ("{head}\na,x,0,{time},{time}", "could not convert"),
        ("{head}\na,1,0,{time},{time}\na,1,0,{time},{time}", "two with the same deploymentID"),
        ("{head}\n=a,1,0,{time},{time}", "begins as a formula does"),
        ("{head}\na,1,0,{time},{time},more", "more cells than columns"),
    ],
)
def test_a_table_that_is_none_is_refused_before_anything_is_written(made, tmp_path, table, message):
    head = "deploymentID,latitude,longitude,deploymentStart,deploymentEnd"
    (tmp_path / "deployments.csv").write_text(table.format(head=head, time="2026-01-01T00:00:00Z"))
    with pytest.raises(ValueError, match=message):
        exported(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_condition_leaves_the_other_segments_out(made, tmp_path):
    out = exported(tmp_path, where="score > 1")
    assert len(read(out, "observations")) == len(read(out, "media")) == len(list((out / "masks").rglob("*.png"))) == 3


def test_frictionless_finds_the_package_valid(made, tmp_path):
    frictionless = pytest.importorskip("frictionless", reason="needs frictionless")
    out = exported(tmp_path)
    package = json.loads((out / "datapackage.json").read_text())
    assert package["profile"].endswith("/camtrap-dp/1.0.2/camtrap-dp-profile.json")
    columns = {"deployments": DEPLOYMENTS, "media": MEDIA, "observations": OBSERVATIONS}
    for resource in package["resources"]:  # the schemas that it names are on the network
        assert resource["schema"].endswith(f"/camtrap-dp/1.0.2/{resource['name']}-table-schema.json")
        resource["schema"] = schema_of(resource["name"], columns[resource["name"]])
    del package["profile"]
    report = frictionless.Package.from_descriptor(package, basepath=str(out)).validate()
    assert report.valid, report.flatten(["rowNumber", "fieldName", "type", "message"])
    assert [task.stats["rows"] for task in report.tasks] == [2, 4, 9]
