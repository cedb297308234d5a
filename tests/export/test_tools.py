"""The tool that an export is for takes it as it is: its own reader, or the rule it publishes, finds picture and masks.

The collection has folders inside folders, some called `images`, accented names, and photographs that are stored turned.
"""

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from PIL import Image, ImageOps

import raypipe
from raypipe.export.export import Export, export

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF>'
    b"</x:xmpmeta>"
)


def stored(kind: str, **options) -> bytes:
    """A dark picture, 48 high and 64 wide, with one bright corner."""
    pixels = np.random.default_rng(0).integers(20, 40, (48, 64, 3), np.uint8)
    pixels[4:20, 6:20] += 190
    Image.fromarray(pixels).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274] = orientation
    return tags.tobytes()


def profile(orientation: int) -> bytes:
    """EXIF as ImageMagick writes it into a PNG's text."""
    content = exif(orientation)
    return b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n%s\n" % (len(content), content.hex().encode()))


def with_chunk(kind: bytes, content: bytes) -> bytes:
    """The PNG with one more chunk behind its header."""
    plain, head = stored("PNG"), 8 + 25
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return plain[:head] + chunk + plain[head:]


TURNED = {
    "jpeg exif.jpg": stored("JPEG", exif=exif(6)),
    "jpeg mirrored.jpg": stored("JPEG", exif=exif(2)),
    "jpeg xmp.jpg": stored("JPEG", xmp=XMP % 6),
    "png exif.png": stored("PNG", exif=exif(8)),
    "png xmp.png": with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % 6),
    "png packed xmp.png": with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP % 3)),
    "png profile.png": with_chunk(b"zTXt", profile(6)),
    "both, at odds.jpg": stored("JPEG", exif=exif(1), xmp=XMP % 6),
    "ruined exif.jpg": stored("JPEG", exif=b"Exif\0\0MM\0*\xff\xff"),
    "webp exif.webp": stored("WebP", exif=exif(6)),
    "webp xmp.webp": stored("WebP", xmp=XMP % 5),
    "tiff.tif": stored("TIFF", exif=exif(6)),
}
AS_STORED = {
    "top.jpg": stored("JPEG"),
    "site1/images/0.jpg": stored("JPEG"),
    "site1/images/0.png": stored("PNG"),  # the same name but for the extension
    "site1/labels/0.jpg": stored("JPEG"),
    "images/x/labels/0.jpg": stored("JPEG"),  # its label lies where a folder of the next one's is
    "images/x/images/0.jpg": stored("JPEG"),
    "images/images/labels/a.jpg": stored("JPEG"),  # both have the label labels/labels/a.txt
    "images/labels/images/a.jpg": stored("JPEG"),
    "Süd Afrika/Tüpfel #1 100%.jpeg": stored("JPEG", exif=exif(1)),
    "v1.2/zero orientation.jpg": stored("JPEG", exif=exif(0)),
    "v1.2/photo.final.PNG": with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % 1),
    "deep.png": with_chunk(b"tEXt", b"Comment\0Orientation 6"),
}


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    """The folder of pictures, `photos`, beside a run that has their dark and their bright part as clusters 0 and 1."""
    folder = tmp_path_factory.mktemp("tools")
    for key, content in (TURNED | AS_STORED).items():
        path = folder / "photos" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    raypipe.label("kmeans", str(folder / "photos"), str(folder / "run"), foreground="whole", local=True)
    return folder


def readings(content: bytes) -> Iterator[np.ndarray]:
    """A picture as readers see it that apply orientations, and as those that do not."""
    import cv2

    image = Image.open(io.BytesIO(content))
    yield np.asarray(image.convert("RGB"))
    yield np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    yield cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def ultralytics_label(image: Path) -> Path:
    """The published rule (`img2label_paths`): the last /images/ becomes /labels/, the extension .txt."""
    return Path("/labels/".join(str(image).rsplit("/images/", 1)).rsplit(".", 1)[0] + ".txt")


def read_yolo(out: Path) -> Iterator[tuple[bytes, np.ndarray]]:
    import cv2

    data = yaml.safe_load((out / "data.yaml").read_text())
    assert data["names"] == {0: "cluster 0", 1: "cluster 1"}
    pictures = [path for path in (out / data["train"]).rglob("*.*") if path.suffix in (".jpg", ".png")]
    labels = {ultralytics_label(path) for path in pictures}
    assert len(labels) == len(pictures) and labels == set(out.rglob("*.txt"))
    for path in pictures:
        height, width = next(readings(path.read_bytes())).shape[:2]
        mask = np.zeros((height, width), np.uint8)
        for line in ultralytics_label(path).read_text().splitlines():
            category, *values = line.split()
            points = np.array(values, float).reshape(-1, 2) * (width, height)
            if category == "1":
                cv2.fillPoly(mask, [points.astype(np.int32)], 1)
        yield path.read_bytes(), mask > 0


def read_hf(out: Path) -> Iterator[tuple[bytes, np.ndarray]]:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(out / "cache"))
    for row, encoded in zip(loaded, loaded.cast_column("image", datasets.Image(decode=False)), strict=True):
        assert row["image"].size == row["mask"].size == (row["width"], row["height"])
        assert {each["category"] for each in row["segments"]} == {"cluster 0", "cluster 1"}
        yield encoded["image"]["bytes"], np.asarray(row["mask"]) == 2


def read_webdataset(out: Path) -> Iterator[tuple[bytes, np.ndarray]]:
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset")
    for sample in webdataset.WebDataset(str(out / "shard-000000.tar"), shardshuffle=False):
        mask = np.asarray(Image.open(io.BytesIO(sample["mask.png"])).convert("RGB"))[..., 0]  # as decode("pil") does
        yield sample.get("jpg") or sample["png"], mask == 2


def read_labelstudio(out: Path) -> Iterator[tuple[bytes, np.ndarray]]:
    converter = pytest.importorskip("label_studio_converter", reason="needs label-studio-converter")
    tasks = json.loads((out / "tasks.json").read_text())
    for i, task in enumerate(tasks):
        task |= {"id": i, "annotations": [task["predictions"][0] | {"id": i, "completed_by": 1}]}  # a person agrees
    (out / "done.json").write_text(json.dumps(tasks))
    (out / "arrays").mkdir()
    to_arrays = converter.Converter(str(out / "config.xml"), project_dir=None)
    to_arrays.convert(str(out / "done.json"), str(out / "arrays"), "BRUSH_TO_NUMPY", is_dir=False)
    for i, task in enumerate(tasks):
        image = unquote(task["data"]["image"].removeprefix("/data/local-files/?d="))
        (array,) = (out / "arrays").glob(f"task-{i}-*cluster 1*.npy")
        yield (out / image).read_bytes(), np.load(array) > 0


READERS = {"yolo": read_yolo, "hf": read_hf, "webdataset": read_webdataset, "labelstudio": read_labelstudio}


@pytest.mark.parametrize("form", READERS)
def test_masks_fit_the_exported_pictures_whichever_way_these_are_read(collection, tmp_path, form):
    result = export(Export(str(collection / "run"), form, output=str(tmp_path / "images/out")))
    assert result.images == len(TURNED | AS_STORED) and result.exit_code == 0
    read = list(READERS[form](tmp_path / "images/out"))
    assert len(read) == result.images
    for content, mask in read:
        for picture in readings(content):
            np.testing.assert_array_equal(picture.mean(2) > 120, mask)
    unchanged = {content for content, _ in read} & set(AS_STORED.values())
    assert unchanged == set(AS_STORED.values())


def test_pycocotools_finds_pictures_and_trainers_keep_the_masks(collection, tmp_path):
    from pycocotools.coco import COCO

    export(Export(str(collection / "run"), "coco", output=str(tmp_path / "out")))
    coco = COCO(str(tmp_path / "out/annotations.json"))
    bright = coco.getCatIds(catNms=["cluster 1"])
    assert len(coco.imgs) == len(TURNED | AS_STORED)
    for image_id, image in coco.imgs.items():
        picture = ImageOps.exif_transpose(Image.open(collection / "photos" / image["file_name"])).convert("RGB")
        assert picture.size == (image["width"], image["height"])
        (annotation,) = coco.loadAnns(coco.getAnnIds(image_id, catIds=bright, iscrowd=False))
        np.testing.assert_array_equal(coco.annToMask(annotation) > 0, np.asarray(picture).mean(2) > 120)
