"""Free texts as names of segments, and their embeddings, in every format: as they are, escaped where that is needed."""

import csv
import io
import json
import re
import tarfile
import xml.etree.ElementTree as ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from support.naming import Naming, embeddings_of

import raypipe
from raypipe.export import formats
from raypipe.export.export import Export, export
from raypipe.maintenance.compact import Compact, compact
from raypipe.maintenance.verify import Verify, verify
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label

TEXTS = (
    "line\nbreak", "cr\r\nlf", "\"quoted\" 'name'", "<script>alert(1)</script>", "=cmd()|' /c calc'!A0", "+1", "\t=1",
    "a; b, c | d", "half \ud83d", "\ufffd dog", "x" * 300, "", "../../up", "\x00nul \x1b[31m", "é 🐕", "\u2028",
    "null", "\ufffe", "- a: b",
)  # fmt: skip
STORED = [text.replace("\ud83d", "\ufffd") for text in TEXTS]  # no table holds half a character


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """As many images as texts, the upper half of each named by one and the lower by the next; and all exports of it."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "photos").mkdir()
    for i in range(len(TEXTS)):
        pixels = np.random.default_rng(i).integers(0, 255, (24, 32, 3), np.uint8)
        pixels[0, 0] = 9, i, 0
        Image.fromarray(pixels).save(folder / f"photos/{i:02d}.png")
    job = Label(str(folder / "photos"), str(folder / "run"), local=True, keep_embeddings=True, sheet=True)
    assert label(job, Naming(texts=TEXTS)).failed == 0
    compact(Compact(job.output))
    assert verify(Verify(job.output, deep=True)).exit_code == 0
    # These take the names of a data set, places on the earth, and camera traps.
    for form in set(formats.names()) - {"imagenets", "geojson", "camtrapdp"}:
        result = export(Export(job.output, form))
        assert (result.images, result.exit_code) == (len(TEXTS), 0)
    return folder / "run"


def test_texts_are_stored_as_they_are_but_for_half_characters(run):
    rows = sorted(raypipe.load(run).to_pylist(), key=lambda row: row["key"])
    assert [row["segments"][0]["label"] for row in rows] == STORED


def test_files_are_named_after_images_and_never_after_texts(run):
    files = [path.relative_to(run / "export") for path in (run / "export").rglob("*") if path.is_file()]
    made = r"(\d\d(_\d)?|annotations|instances_default|images|labels|tasks|config|data|megadetector|values|README|"
    made += r"croissant|metadata|samples|train-0+|shard-0+|_export|_left_out)\.\w+"
    named = [path for path in files if path.parts[0] != "rating"]
    assert len(named) > 5 * len(TEXTS) and all(re.fullmatch(made, path.name) for path in named)


def test_json_and_yaml_have_the_texts_letter_by_letter(run):
    coco = json.loads((run / "export/coco/annotations.json").read_text())
    assert sorted(each["name"] for each in coco["categories"]) == sorted(STORED)
    of = {each["id"]: each["name"] for each in coco["categories"]}
    first = [each for each in coco["annotations"] if each["image_id"] == 1]
    assert len(first) == 2 and {of[each["category_id"]] for each in coco["annotations"]} == {*STORED}
    names = yaml.safe_load((run / "export/yolo/data.yaml").read_text())["names"]
    assert [*names.values()] == sorted(STORED)


def test_spreadsheets_run_no_text(run):
    def cells(file):
        return list(csv.reader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")))

    header, *lines = cells(run / "export/csv/images.csv")
    labels = [line[header.index("labels")] for line in lines]
    assert labels[0] == f"{STORED[0]}; {STORED[1]}" and labels[4] == f"'{STORED[4]}; {STORED[5]}"
    names = [name for _, name in cells(run / "export/png/values.csv")[2:]]
    assert names == ["'" + name if name.startswith(("=", "+", "-", "\t")) else name for name in sorted(STORED)]


def test_the_interface_of_label_studio_and_its_masks_name_the_same(run):
    labels = ElementTree.parse(run / "export/labelstudio/config.xml").findall(".//Label")
    values = [each.get("value") for each in labels]
    assert len(set(values)) == len(values) and "\ufffdnul \ufffd[31m" in values
    assert {*STORED} - {*values} == {"\x00nul \x1b[31m", "\ufffe"}
    tasks = json.loads((run / "export/labelstudio/tasks.json").read_text())
    regions = [region for task in tasks for region in task["predictions"][0]["result"]]
    assert {name for region in regions for name in region["value"]["brushlabels"]} == {*values}


def test_a_dataset_card_has_a_line_per_name_and_no_markup_of_theirs(run):
    card = (run / "export/hf/README.md").read_text()
    table = card[card.index("| 0 | background |") : card.index("```json")].strip().split("\n")
    assert len(table) == 1 + len(STORED) and all(line.count("|") == 3 for line in table)
    assert "| &lt;script&gt;alert(1)&lt;/script&gt; |" in card and "| a; b, c &#124; d |" in card


def test_hugging_face_and_webdataset_carry_embeddings(run):
    expected = {}
    for path in sorted(run.parent.glob("photos/*.png")):
        expected[path.name] = embeddings_of(np.asarray(Image.open(path))).astype(np.float16)
    table = pq.read_table(run / "export/hf/data/train-00000.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["segments"][0]["embedding"] == [{"dtype": "float16", "_type": "Value"}]
    for row in table.to_pylist():
        found = np.array([each["embedding"] for each in row["segments"]], np.float16)
        np.testing.assert_array_equal(found, expected[row["key"]])
    with tarfile.open(run / "export/webdataset/shard-000000.tar") as shard:
        for key, embeddings in expected.items():
            member = shard.extractfile(key.replace(".png", ".embeddings.npy"))
            np.testing.assert_array_equal(np.load(io.BytesIO(member.read())), embeddings)


def test_an_export_of_some_segments_has_their_embeddings_alone(run, tmp_path):
    export(Export(str(run), "webdataset", output=str(tmp_path / "out"), where="segment = 1 and key < '02'"))
    with tarfile.open(tmp_path / "out/shard-000000.tar") as shard:
        found = np.load(io.BytesIO(shard.extractfile("01.embeddings.npy").read()))
    expected = embeddings_of(np.asarray(Image.open(run.parent / "photos/01.png")))[1:]
    np.testing.assert_array_equal(found, expected.astype(np.float16))
