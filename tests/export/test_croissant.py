"""croissant.json beside the Hugging Face export: its fields lead to the columns, and its own loader finds the masks."""

import io
import json
from fnmatch import fnmatch

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.exported import EMPTY_KEY, write_worst

from raypipe import masks
from raypipe.export.export import Export, export


def test_each_field_leads_to_what_the_files_hold(tmp_path):
    write_worst(tmp_path)
    out = tmp_path / "out"
    export(Export(str(tmp_path / "run"), "hf", output=str(out)))
    content = json.loads((out / "croissant.json").read_text())
    (files,), (records,) = content["distribution"], content["recordSet"]
    paths = [path for path in out.rglob("*") if fnmatch(str(path.relative_to(out)), files["includes"])]
    columns = pq.read_table(paths[0]).to_pylist()
    assert [field["name"] for field in records["field"]] == list(columns[0])
    prefixes = {word.split(":")[0] for word in content["@context"] if ":" not in word}
    for field in records["field"]:
        for each in field.get("subField", [field]):
            assert each["source"]["fileSet"] == {"@id": files["@id"]} and each["dataType"].split(":")[0] in prefixes
            assert each["source"]["extract"]["column"] == field["name"]
            values = [value for row in columns for value in np.atleast_1d(row[field["name"]])]
            step = each["source"].get("transform", {}).get("jsonPath")
            assert all(step is None or step in value for value in values)
            if each["dataType"] == "sc:ImageObject":
                assert all(Image.open(io.BytesIO(value[step])).size for value in values)


def test_mlcroissant_loads_pictures_and_exact_masks(tmp_path, caplog):
    mlcroissant = pytest.importorskip("mlcroissant", reason="needs mlcroissant")
    expected = write_worst(tmp_path)
    export(Export(str(tmp_path / "run"), "hf", output=str(tmp_path / "out")))
    loaded = mlcroissant.Dataset(jsonld=str(tmp_path / "out/croissant.json"))
    assert not loaded.metadata.ctx.issues.errors and "not standard" not in caplog.text
    seen = {}
    for record in loaded.records("images"):
        key = record["images/key"].decode()
        segments = [
            {name.rpartition("/")[2]: value for name, value in each.items()} for each in record["images/segments"]
        ]
        found, _, scores = expected[key]
        assert record["images/image"].size == record["images/mask"].size == (found.shape[2], found.shape[1])
        for i, (segment, mask) in enumerate(zip(segments, found, strict=True)):
            rle = {"size": segment["size"], "counts": segment["counts"].decode()}
            np.testing.assert_array_equal(masks.decode_rle(rle), mask)
            assert (segment["area"], segment["segment"], segment["score"]) == (mask.sum(), i, scores[i])
        seen[key] = len(segments)
    assert seen.keys() == expected.keys() and seen[EMPTY_KEY] == 0
