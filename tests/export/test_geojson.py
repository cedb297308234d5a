"""GeoJSON: polygons along pixel edges, which drawn again by any rule of filling are the mask."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from support.exported import NAMES
from support.written import masks_row, random_masks, write_run

from raypipe.export.export import Export, export
from raypipe.export.formats.geojson import of_tags, polygons

NORTH_UP = (0.25, 0.0, 500000.5, 0.0, -0.25, 4649776.25)  # a quarter of a metre, in UTM
LEANING = (0.5, 0.125, -3.0, 0.25, -0.75, 7.0)


def filled(rings: list, shape: tuple[int, int]) -> np.ndarray:
    """Pixels inside by the even-odd rule: each upright step of an outline turns all pixels on its right over."""
    inside = np.zeros(shape, bool)
    for ring in rings:
        for (x, y), (_, other) in zip(ring[:-1], ring[1:], strict=True):
            inside[min(y, other) : max(y, other), x:] ^= True
    return inside


def signed_area(ring: list) -> float:
    """Positive for a ring that runs counter-clockwise where y points up."""
    return sum(x * v - u * y for (x, y), (u, v) in zip(ring[:-1], ring[1:], strict=True)) / 2


def every_mask(height: int, width: int):
    for bits in range(1 << height * width):
        yield np.array([bits >> i & 1 for i in range(height * width)], bool).reshape(height, width)


def test_outlines_are_exact_closed_and_never_meet_themselves():
    rng = np.random.default_rng(0)
    large = [rng.random(size) < share for size in ((1, 9), (30, 41)) for share in (0.3, 0.5, 0.8)]
    for mask in [*every_mask(3, 3), *large]:
        covered = np.zeros(mask.shape, int)
        for rings in polygons(mask):
            covered += filled(rings, mask.shape)
            for i, ring in enumerate(rings):
                assert (ring[0] == ring[-1]).all() and len({tuple(point) for point in ring}) == len(ring) - 1 >= 4
                assert (signed_area(ring.tolist()) > 0) == (i == 0)  # y points down here
        np.testing.assert_array_equal(covered, mask)


def geotiff(pixels: np.ndarray, path: Path, *, transform: tuple, epsg: int, point: bool = False) -> None:
    a, b, c, d, e, f = transform
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    shift = ((a + b) / 2, (d + e) / 2) if point else (0, 0)
    if b or d:
        tags[34264] = (a, b, 0.0, c + shift[0], d, e, 0.0, f + shift[1], *[0.0] * 8)
        tags.tagtype[34264] = 12  # doubles
    else:
        tags[33550], tags[33922] = (a, -e, 0.0), (2.0, 3.0, 0.0, c + 2 * a + shift[0], f + 3 * e + shift[1], 0.0)
        tags.tagtype[33550] = tags.tagtype[33922] = 12
    model = (2, 2048) if epsg == 4326 else (1, 3072)
    tags[34735] = (1, 1, 0, 3, 1024, 0, 1, model[0], 1025, 0, 1, 2 if point else 1, model[1], 0, 1, epsg)
    tags.tagtype[34735] = 3  # shorts
    Image.fromarray(pixels).save(path, tiffinfo=tags)


@pytest.fixture
def made(tmp_path) -> dict[str, tuple]:
    """A run over images with a place of each kind: keys -> masks, transform, EPSG code."""
    rng, table, expected = np.random.default_rng(0), [], {}
    kinds = {
        "utm.tif": (NORTH_UP, 32633, False),
        "lonlat.tif": ((0.5, 0.0, -10.0, 0.0, -0.5, 50.0), 4326, False),
        "point.tif": (NORTH_UP, 32633, True),
        "leaning.tif": (LEANING, 32633, False),
        "world.jpg": (LEANING, None, False),
        "south up.png": ((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None, False),
        "no place.png": (None, None, False),
    }
    for i, (key, (transform, epsg, point)) in enumerate(kinds.items()):
        size, path = (7 + i, 12 - i), tmp_path / key
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        if key.endswith(".tif"):
            geotiff(pixels, path, transform=transform, epsg=epsg, point=point)
        else:
            Image.fromarray(pixels).save(path)
        if transform and not key.endswith(".tif"):
            a, b, c, d, e, f = transform
            lines = (a, d, b, e, c + (a + b) / 2, f + (d + e) / 2)
            path.with_suffix({".jpg": ".jgw", ".png": ".wld"}[path.suffix]).write_text("\n".join(map(str, lines)))
        found = np.concatenate([random_masks(rng, size, 2), np.zeros((1, *size), bool)])[: 0 if i == 1 else 3]
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        names, scores = [NAMES[0], NAMES[2], "cat"][: len(found)], [0.5, 1.5, 0.1][: len(found)]
        table.append(masks_row(key, found, uri=str(path), sha256=sha256, labels=names, scores=scores))
        expected[key] = (found, transform, epsg)
    table.append(masks_row("broken.tif", np.zeros((0, 1, 1)), error="decode: truncated: it ends early"))
    write_run(str(tmp_path / "run"), table)
    return expected


def read(out: Path, key: str) -> dict:
    return json.loads((out / key).with_suffix(".geojson").read_text())


def test_polygons_are_the_masks_at_their_place(made, tmp_path):
    result = export(Export(str(tmp_path / "run"), "geojson", output=str(tmp_path / "out")))
    assert result.left_out == {"original no place": 1, "labelling failed: decode: truncated": 1}
    assert result.remarks["files name no coordinate system: their image does not say its own"] == 2
    assert len(list((tmp_path / "out").glob("*.geojson"))) == len(made) - 1
    for key, (found, transform, epsg) in made.items():
        if transform is None:
            continue
        content, (a, b, c, d, e, f) = read(tmp_path / "out", key), transform
        name = f"urn:ogc:def:crs:EPSG::{epsg}"
        assert content.get("crs", {}).get("properties", {}).get("name") == (name if epsg == 32633 else None)
        back = np.linalg.inv([[a, b], [d, e]])
        assert len(content["features"]) == sum(mask.any() for mask in found)
        for mask, feature in zip(found, content["features"], strict=False):
            covered = np.zeros(mask.shape, int)
            for part in feature["geometry"]["coordinates"]:
                assert [signed_area(ring) > 0 for ring in part] == [True] + [False] * (len(part) - 1)  # RFC 7946
                corners = [(np.array(ring) - (c, f)) @ back.T for ring in part]
                np.testing.assert_allclose(np.concatenate(corners), np.rint(np.concatenate(corners)), atol=1e-6)
                covered += filled([np.rint(ring).astype(int).tolist() for ring in corners], mask.shape)
            np.testing.assert_array_equal(covered, mask)
            assert feature["properties"]["pixels"] == mask.sum()
        assert [each["properties"]["category"] for each in content["features"]] == [NAMES[0], NAMES[2]][: len(found)]


def test_a_condition_leaves_the_other_segments_out(made, tmp_path):
    export(Export(str(tmp_path / "run"), "geojson", output=str(tmp_path / "out"), where="score > 1"))
    assert [each["properties"]["segment"] for each in read(tmp_path / "out", "utm.tif")["features"]] == [1]
    assert not (tmp_path / "out/lonlat.geojson").exists()


def test_what_has_no_place_is_told(made, tmp_path):
    (tmp_path / "world.jgw").write_text("1 2 3")
    (tmp_path / "south up.wld").write_text("0 0 0 0 1 1")
    result = export(Export(str(tmp_path / "run"), "geojson", output=str(tmp_path / "out")))
    assert result.left_out["original world file"] == 1 and result.left_out["original no place"] == 2
    assert of_tags(b"\xff\xd8\xff\xe0") is None
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[34735] = (1, 1, 0)  # no four numbers for each key
    tags.tagtype[34735] = 3
    Image.new("RGB", (4, 3)).save(tmp_path / "damaged.tif", tiffinfo=tags)
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (4, 3)).save(tmp_path / "turned.tif", exif=exif)
    table = []
    for name, size in (("turned.tif", (4, 3)), ("damaged.tif", (3, 4))):
        sha256 = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        table.append(masks_row(name, np.ones((1, *size), bool), uri=str(tmp_path / name), sha256=sha256))
    write_run(str(tmp_path / "other"), table)
    assert export(Export(str(tmp_path / "other"), "geojson")).left_out == {"original turned": 1, "original no place": 1}
    (row,) = [row for row in (tmp_path / "other/export/geojson/_left_out.csv").open() if "damaged.tif" in row]
    assert "has damaged GeoTIFF tags" in row


def test_gdal_draws_the_same_pixels(made, tmp_path):
    features = pytest.importorskip("rasterio.features", reason="needs rasterio")
    import rasterio

    export(Export(str(tmp_path / "run"), "geojson", output=str(tmp_path / "out")))
    for key, (found, transform, epsg) in made.items():
        if transform is None:
            continue
        if key.endswith(".tif"):
            with rasterio.open(tmp_path / key) as file:
                assert tuple(file.transform)[:6] == pytest.approx(transform) and file.crs.to_epsg() == epsg
        for mask, feature in zip(found, read(tmp_path / "out", key)["features"], strict=False):
            affine = rasterio.Affine(*transform)
            drawn = features.rasterize([feature["geometry"]], mask.shape, transform=affine)
            np.testing.assert_array_equal(drawn > 0, mask)


def test_shapely_finds_every_polygon_valid(made, tmp_path):
    geometry = pytest.importorskip("shapely.geometry", reason="needs shapely")
    export(Export(str(tmp_path / "run"), "geojson", output=str(tmp_path / "out")))
    for path in (tmp_path / "out").glob("*.geojson"):
        for feature in json.loads(path.read_text())["features"]:
            for part in feature["geometry"]["coordinates"]:
                assert geometry.Polygon(part[0], part[1:]).is_valid
