"""Mask files as people have them: what their values mean, and whose they are."""

import logging
import unicodedata

import numpy as np
import pytest
from PIL import Image

from raypipe.inputs import maskfiles
from raypipe.inputs.maskkinds import Kind, chosen, parse

SIZE = (48, 64)
LIMITS = {"max_bytes": 10**8, "max_pixels": 10**8}


def objects() -> list[np.ndarray]:
    """The masks of two images, bool."""
    first, second = np.zeros((2, *SIZE), bool)
    first[12:36, 16:48] = second[8:20, 10:50] = second[30:44, 22:30] = True
    return [first, second]


def ring(mask: np.ndarray) -> np.ndarray:
    """The pixels just outside a mask."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown & ~mask


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


def palette(values: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def cut_out(mask: np.ndarray, under: int) -> Image.Image:
    """A picture, opaque where the mask is. under: the colour of what is transparent."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    picture = np.stack([40 + 3 * y, 30 + 2 * x, 20 + y + x], -1)
    return Image.fromarray(np.dstack([np.where(mask[..., None], picture, under), mask * 255]).astype(np.uint8))


def on_transparent(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([np.zeros((*SIZE, 3)), mask * 255]).astype(np.uint8))


def save(folder, images, ending: str = ".png", names: str = "ab", **options) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images, strict=True):
        image.save(folder / f"{name}{ending}", **options)
    return str(folder)


def recognised(folder: str) -> Kind:
    return maskfiles.kind_of(maskfiles.match(folder, ["a.jpg", "b.jpg"]), what="labels", option="OPTION", **LIMITS)


def read_all(folder: str, kind: Kind) -> list[np.ndarray]:
    location = maskfiles.match(folder, ["a.jpg", "b.jpg"]).location
    return [maskfiles.read(location[f"{name}.jpg"], kind, **LIMITS) for name in "ab"]


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)
MADE = {  # a file of a mask, its kind
    "0 and 255": (lambda m: grey(m * 255), "light"),
    "one bit": (lambda m: Image.fromarray(m), "light"),
    "16 bits, white": (lambda m: Image.fromarray((m * 65535).astype(np.uint16)), "light"),
    "grey as RGB": (lambda m: grey(m * 255).convert("RGB"), "light"),
    "opaque RGBA": (lambda m: grey(m * 255).convert("RGBA"), "light"),
    "black and white palette": (lambda m: palette(m, BLACK, WHITE), "light"),
    "0 and 1": (grey, "nonzero"),
    "0 and 38": (lambda m: grey(m * 38), "nonzero"),
    "0 and 200": (lambda m: grey(m * 200), "nonzero"),
    "16 bits, 0 and 1": (lambda m: Image.fromarray(m.astype(np.uint16)), "nonzero"),
    "identities": (lambda m: Image.fromarray((m * (1000 + np.arange(SIZE[1]) // 8)).astype(np.uint16)), "nonzero"),
    "32 bits": (lambda m: Image.fromarray(m.astype(np.int32) * 7), "nonzero"),
    "coloured palette": (lambda m: palette(m, BLACK, (0, 60, 0)), "nonzero"),
    "palette with white first": (lambda m: palette(m, WHITE, RED), "nonzero"),
    "one colour": (lambda m: Image.fromarray(np.where(m[..., None], (0, 90, 0), BLACK).astype(np.uint8)), "nonzero"),
    "trimap": (lambda m: grey(np.where(m, 1, np.where(ring(m), 3, 2))), "1"),
    "trimap of a matting": (lambda m: grey(np.where(m, 255, np.where(ring(m), 128, 0))), "255"),
    "void": (lambda m: grey(np.where(m, 15, np.where(ring(m), 255, 0))), "15"),
    "void, 16 bits": (lambda m: Image.fromarray(np.where(m, 1, ring(m) * 255).astype(np.uint16)), "1"),
    "few soft levels": (lambda m: Image.fromarray(np.where(m, 0.75, 0.25 * (ring(m))).astype(np.float32)), "light"),
    "void, palette": (lambda m: palette(np.where(m, 2, np.where(ring(m), 255, 0)), *[RED, BLACK] * 128), "2"),
    "cut-out": (lambda m: cut_out(m, 0), "alpha"),
    "cut-out with white beneath": (lambda m: cut_out(m, 255), "alpha"),
    "white with alpha": (lambda m: Image.merge("LA", [grey(m * 0 + 255), grey(m * 255)]), "alpha"),
    "palette with a transparent number": (lambda m: palette(m, BLACK, WHITE), "alpha"),
    "ink on white": (lambda m: grey(255 - m * 255), "ink"),
    "ink on white, one bit": (lambda m: Image.fromarray(~m), "ink"),
    "ink on white, palette": (lambda m: palette(m, WHITE, BLACK), "ink"),
    "ink on transparent": (on_transparent, "ink"),
    "red ink": (lambda m: Image.fromarray(np.where(m[..., None], RED, WHITE).astype(np.uint8)), "ink"),
}


@pytest.mark.parametrize("name", MADE)
def test_a_mask_is_the_same_however_it_is_stored(tmp_path, name):
    make, kind = MADE[name]
    options = {"transparency": 0} if "transparent number" in name else {}
    ending = ".tif" if name in ("32 bits", "few soft levels") else ".png"
    folder = save(tmp_path / "all", map(make, objects()), ending, **options)
    assert str(recognised(folder)) == kind
    np.testing.assert_array_equal(read_all(folder, recognised(folder)), objects())
    alone = save(tmp_path / "one", [make(objects()[0])], ending, "a", **options)
    assert str(recognised(alone)) == kind


@pytest.mark.parametrize("is_ink", [False, True])
def test_soft_edges_and_jpeg_leave_the_mask_as_it_was_drawn(tmp_path, is_ink):
    sheets = [grey((255 - mask * 255) if is_ink else mask * 255) for mask in objects()]
    jpegs = save(tmp_path / "jpeg", [sheet.convert("RGB") for sheet in sheets], ".jpg", quality=75)
    soft = save(
        tmp_path / "soft", [sheet.resize((32, 24)).resize(SIZE[::-1], Image.Resampling.BICUBIC) for sheet in sheets]
    )
    for folder in (jpegs, soft):
        assert str(recognised(folder)) == ("ink" if is_ink else "light")
        for found, mask in zip(read_all(folder, recognised(folder)), objects(), strict=True):
            assert (found != mask).mean() < 0.03


def test_probabilities_that_are_nearly_sure_are_no_numbers(tmp_path):
    rng = np.random.default_rng(0)
    sure = [np.where(rng.random(SIZE) < 0.15, rng.integers(0, 256, SIZE), mask * 254 + 1) for mask in objects()]
    for values in sure:
        values[0, :2] = 0, 255
        values[-1] = values[-1, 0]
    assert str(recognised(save(tmp_path, map(grey, sure)))) == "light"


def test_ink_on_white_and_on_transparent_are_one_kind(tmp_path, caplog):
    first, second = objects()
    folder = save(tmp_path, [grey(255 - first * 255).convert("RGB"), on_transparent(second)])
    with caplog.at_level(logging.INFO, "raypipe"):
        np.testing.assert_array_equal(read_all(folder, recognised(folder)), objects())
    assert caplog.messages[-1] == "labels: ink on white or transparent, 2 files"


def test_an_empty_and_a_full_mask_say_nothing_of_the_kind(tmp_path):
    first, (full, empty) = objects()[0], np.stack([np.ones(SIZE, bool), np.zeros(SIZE, bool)])
    for name, (make, kind) in MADE.items():
        if "trimap" in name or "transparent number" in name or "white" in name or "32" in name or "soft" in name:
            continue
        folder = save(tmp_path / name, [make(mask) for mask in (first, full, empty)], names="abc")
        assert str(recognised(folder)) == kind, name
        np.testing.assert_array_equal(read_all(folder, recognised(folder)), [first, full])


@pytest.mark.parametrize(
    ("one", "other"),
    [("0 and 255", "ink on white"), ("0 and 1", "cut-out"), ("ink on white", "0 and 38"), ("trimap", "ink on white")],
)
def test_files_of_several_kinds_are_an_error_that_names_one_of_each(tmp_path, one, other):
    first, second = objects()
    folder = save(tmp_path, [MADE[one][0](first), MADE[other][0](second)])
    with pytest.raises(ValueError, match=r"of several kinds.*'[ab]\.png'.*'[ab]\.png'.*OPTION"):
        recognised(folder)


def test_a_rare_file_of_another_kind_is_a_remark(tmp_path, caplog):
    sheets = [grey(objects()[i % 2] * 255) for i in range(20)]
    folder = save(tmp_path, [*sheets, grey(255 - objects()[0] * 255)], names="abcdefghijklmnopqrstu")
    assert str(recognised(folder)) == "light"
    assert "1 ink on white, such as 'u.png'" in caplog.text


def test_numbers_that_are_set_up_to_the_border_are_a_remark(tmp_path, caplog):
    folder = save(tmp_path, [grey(~mask) for mask in objects()])
    assert str(recognised(folder)) == "nonzero"
    assert "most labels are set up to the border, such as 'a.png'; is value 0 the object? OPTION" in caplog.text
    np.testing.assert_array_equal(read_all(folder, parse("0")), objects())


def test_0_and_1_beside_0_and_255_are_both_masks(tmp_path):
    first, second = objects()
    folder = save(tmp_path, [grey(first), grey(second * 255)])
    np.testing.assert_array_equal(read_all(folder, recognised(folder)), objects())


def test_masks_without_a_set_pixel_are_an_error_and_full_ones_a_remark(tmp_path, caplog):
    for name, make in {"grey": grey, "cut": lambda m: cut_out(m, 0)}.items():
        empty = save(tmp_path / f"{name} empty", [make(np.zeros(SIZE, bool))] * 2)
        with pytest.raises(ValueError, match="no pixel of any of the labels is set.*OPTION"):
            recognised(empty)
    full = save(tmp_path / "full", [grey(np.full(SIZE, 255))] * 2)
    assert str(recognised(full)) == "light"
    assert "every pixel of each file is set" in caplog.text


def test_several_classes_are_asked_for_and_numbers_are_read_as_stored(tmp_path):
    first, second = objects()
    classes = [np.where(mask, 1 + i, 0) + 2 * ring(mask) for i, mask in enumerate((first, second))]
    for name, make in {"grey": grey, "palette": lambda m: palette(m, BLACK, RED, WHITE, RED)}.items():
        folder = save(tmp_path / name, [make(values) for values in classes])
        with pytest.raises(ValueError, match=r"several values, 0 .*%, 1 .*which of them is the object\? OPTION"):
            recognised(folder)
        np.testing.assert_array_equal(read_all(folder, parse("1,2")), [v > 0 for v in classes])
        np.testing.assert_array_equal(read_all(folder, parse("1")), [v == 1 for v in classes])
        np.testing.assert_array_equal(read_all(folder, parse("nonzero")), [v > 0 for v in classes])


def test_photographs_are_no_masks(tmp_path):
    rng = np.random.default_rng(0)
    for shape in ((*SIZE, 3), SIZE):
        photos = [Image.fromarray(rng.integers(60, 200, shape, np.uint8)) for _ in "ab"]
        with pytest.raises(ValueError, match="look like pictures"):
            recognised(save(tmp_path / str(len(shape)), photos))


def test_cut_outs_on_white_are_no_ink(tmp_path):
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    coat = np.stack([90 + 80 * np.sin(x / 3), 60 + 50 * np.cos(y / 3), 60 + x], -1).astype(np.uint8)
    cuts = [Image.fromarray(np.where(m[..., None], coat, 255).astype(np.uint8)) for m in objects()]
    for ending in (".png", ".jpg"):
        with pytest.raises(ValueError, match="look like pictures"):
            recognised(save(tmp_path / ending, cuts, ending))


@pytest.mark.parametrize("is_ink", [False, True])
def test_masks_that_reach_the_border_or_cover_most_are_of_the_folders_kind(tmp_path, is_ink):
    first, second = objects()
    half, most = np.arange(SIZE[1]) % 3 == 0, np.zeros(SIZE, bool)
    half[0], most[2:-2, 2:-2] = False, True
    second = second | half
    masks = [first, second, most if is_ink else first]
    folder = save(tmp_path, [grey((255 - m * 255) if is_ink else m * 255) for m in masks], names="abc")
    assert str(recognised(folder)) == ("ink" if is_ink else "light")
    np.testing.assert_array_equal(read_all(folder, recognised(folder)), masks[:2])


def test_a_kind_or_values_may_be_asked_for():
    assert chosen(None, None) is None and str(chosen("ink", None)) == "ink" and chosen(None, "3,1").values == (1, 3)
    for kind, value, message in (
        ("inc", None, "choose one of light, ink, alpha, nonzero"),
        (None, "one", "whole numbers"),
        ("ink", "1", "no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen(kind, value)
    assert parse("masks") is None and parse("") is None and parse("/1") is None


def test_a_turned_mask_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    mask = objects()[1]
    folder = save(tmp_path, [grey(np.rot90(mask) * 255)], names="a", exif=exif)
    found = maskfiles.read(f"{folder}/a.png", parse("light"), **LIMITS)
    np.testing.assert_array_equal(found, mask)


NAMES = {  # key of an image, name of its mask
    "whole name": [("a.jpg", "a.jpg.png"), ("a.png", "a.png.png")],
    "word": [("a.jpg", "a_mask.png"), ("b.jpg", "b_mask.png")],
    "other words": [("x/a.jpg", "x/a-seg.png"), ("b.jpg", "b_Segmentation.PNG"), ("c.jpg", "c_gt_mask.tif")],
    "word before": [("001.jpg", "mask_001.png"), ("002.jpg", "mask_002.png")],
    "case and separators": [("IMG 1.JPG", "img_1.png"), ("IMG-2.JPG", "img 2.png")],
    "ending in capitals": [("a.jpg", "a.JPG.png"), ("b.JPG", "b.jpg.PNG")],
    "double ending": [("a.png.jpg", "a.png"), ("b.jpg.jpg", "b.png")],
    "Unicode form": [(unicodedata.normalize("NFC", "Süd/é.jpg"), unicodedata.normalize("NFD", "Süd/é.png"))],
    "word in another folder": [("photos/a.jpg", "labels/a_label.png"), ("photos/b.jpg", "labels/b_label.png")],
    "words of images": [("a.jpg", "A.png"), ("a_label.jpg", "A_label.png")],
}


def touch(folder, names) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


@pytest.mark.parametrize("pairs", NAMES.values(), ids=NAMES)
def test_masks_have_the_names_that_tools_give_them(tmp_path, pairs):
    folder = touch(tmp_path, [name for _, name in pairs])
    matches = maskfiles.match(folder, [key for key, _ in pairs])
    assert {key: location.removeprefix(f"{folder}/") for key, location in matches.location.items()} == dict(pairs)
    assert matches.unused == []


def test_no_image_gets_a_mask_that_may_be_anothers(tmp_path):
    touch(tmp_path, ["a_mask.png", "a_seg.png", "b.png", "c_mask.png", "x/d_mask.png", "y/d_mask.png"])
    matches = maskfiles.match(str(tmp_path), ["a.jpg", "b.jpg", "B.jpg", "C.jpg", "c.jpg", "d.jpg"])
    assert list(matches.location) == ["b.jpg"]


@pytest.mark.parametrize("name", ["{}.png", "{}_mask.png", "{}.jpg.png"])
def test_masks_may_lie_beside_their_photographs(tmp_path, name):
    files = [f"{stem}.jpg" for stem in "abc"] + [name.format(stem) for stem in "ab"]
    folder = touch(tmp_path, files)
    matches = maskfiles.match(folder, ["a.jpg", "b.jpg", "c.jpg"])
    assert matches.location == {f"{stem}.jpg": f"{folder}/{name.format(stem)}" for stem in "ab"}
    assert [file for file, _ in matches.files] == [name.format(stem) for stem in "ab"]


def test_labels_named_as_the_images_are_theirs_whatever_lies_beside(tmp_path):
    folder = touch(tmp_path, ["a.png", "b.png", "c.png", "a_mask.png", "dog.png"])
    matches = maskfiles.match(folder, ["a.png", "b.png", "c.png"])
    assert matches.location == {f"{stem}.png": f"{folder}/{stem}.png" for stem in "abc"}


@pytest.mark.parametrize(
    ("key", "names", "message"),
    [
        ("a.jpg", ["a_v2.png"], "images are named as 'a.jpg', labels as 'a_v2.png', with '_v2' besides"),
        ("a.jpg", ["x.png"], "images are named as 'a.jpg', labels as 'x.png'"),
        ("a.jpg", ["a_mask.png", "a_seg.png"], "several labels could be that of 'a.jpg': 'a_mask.png', 'a_seg.png'"),
        ("zebra_1.jpg", ["cow_1.png", "zebra1.png"], "images are named as 'zebra_1.jpg', labels as 'zebra1.png'"),
        ("a.jpg", [], ""),
    ],
)
def test_what_differs_in_the_names_is_said_with_full_endings(key, names, message):
    assert maskfiles.difference(key, names, what="labels").removeprefix("; ") == message
