"""Faces on a page are blurred when that is asked for."""

import hashlib
import re

import numpy as np
import pytest
from PIL import Image
from support import red_faces
from support.browsing import open_uri
from support.shares import row, write_run

from raypipe.cli.verbs import main


@pytest.fixture
def run(tmp_path):
    """A run of two photographs of stripes, one with a face, which is where it is red."""
    rows = []
    for name, red in (("person", 255), ("nobody", 0)):
        image = np.zeros((96, 160, 3), np.uint8)
        image[:, ::8, 1] = 255
        image[60:64, 40:44] = (red, 0, 0)
        path = tmp_path / f"{name}.png"
        Image.fromarray(image).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(row(path.name, height=96, width=160, segments=[], sha256=digest, uri=str(path)))
    write_run(tmp_path / "run", rows)
    return tmp_path / "run"


def photograph(run, name: str) -> np.ndarray:
    card = re.search(rf'data-name="{name}.*?class="original" src="([^"]*)"', (run / "report.html").read_text(), re.S)
    return np.asarray(open_uri(card[1]), np.float64)


def test_faces_alone_are_blurred_and_the_page_says_so(run, tmp_path):
    says = "Faces that a detector found are blurred"
    assert main(["report", str(run)]) == 0 and says not in (run / "report.html").read_text()
    before = {name: photograph(run, name) for name in ("person", "nobody")}
    model = red_faces.centerface(tmp_path / "faces.onnx")
    assert main(["report", str(run), "--blur-faces", str(model)]) == 0 and says in (run / "report.html").read_text()
    np.testing.assert_array_equal(photograph(run, "nobody"), before["nobody"])
    inside, after = np.s_[45:80, 26:54, 1], photograph(run, "person")
    assert after[inside].std() < before["person"][inside].std() / 2
    assert np.abs(after - before["person"])[:, 72:].max() < 2


def test_a_model_that_is_not_there_stops_before_a_page_is_made(run, tmp_path, capsys):
    assert main(["report", str(run), "--blur-faces", str(tmp_path / "none.onnx")]) == 2
    assert "none.onnx cannot be read" in capsys.readouterr().err and not (run / "report.html").exists()
