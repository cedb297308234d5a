"""The list of unsafe concepts and what it decides."""

import numpy as np
import pytest

from raypipe.archive import safety
from raypipe.archive.safety import Concepts
from raypipe.classes import normalised


@pytest.mark.parametrize("rows", [4, safety.ROWS])
def test_an_image_is_unsafe_where_an_unsafe_concept_is_nearer_than_all_safe_ones(monkeypatch, rows):
    monkeypatch.setattr(safety, "ROWS", rows)
    texts = np.eye(4, 6, dtype=np.float32)
    images = np.float32([[3, 1, 2, 0], [0, 3, 2, 1], [2, 2, 2, 0], [1, 2, 3, 0], [1, 2, 0, 3], [-1, -2, -3, -2]])
    images = np.pad(images, ((0, 0), (0, 2)))
    unsafe = Concepts(("a", "b"), ("c", "d")).are_unsafe(images, texts)
    assert unsafe.tolist() == [True, True, False, False, False, True]
    assert Concepts(("a", "b"), ("c", "d")).are_unsafe(images.astype(np.float16), texts).tolist() == unsafe.tolist()


def test_the_packaged_concepts_are_as_a_file_of_them_is(tmp_path):
    ours, file = safety.read(), tmp_path / "concepts.yaml"
    file.write_text("unsafe: [no, 1984]\nsafe:\n- é\n", encoding="utf-8")
    assert safety.read(str(file)) == Concepts(("no", "1984"), ("é",))
    file.write_bytes(safety.DEFAULT.read_bytes())
    assert safety.read(str(file)) == ours and len(ours.unsafe) >= 10 and len(ours.safe) >= 20
    assert len(set(map(normalised, ours.unsafe + ours.safe))) == len(ours.unsafe + ours.safe)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- nudity", "expected two lists"),
        ("unsafe: [nudity]", "expected two lists"),
        ("{unsafe: [nudity], safe: []}", "expected two lists"),
        ("{unsafe: [nudity], safe: [dog, '']}", "expected two lists"),
        ("{unsafe: nudity, safe: [dog]}", "expected two lists"),
        ("{unsafe: [nudity], safe: [dog], level: 3}", "nothing else"),
        ("{unsafe: [hate_symbol], safe: [dog, Hate symbol]}", "'hate symbol' stands there twice"),
        ("{unsafe: [", "cannot be read as YAML"),
        ("\x00", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_list_of_concepts_is_refused(tmp_path, content, words):
    (tmp_path / "concepts.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"--concepts .*concepts\.yaml.*{words}"):
        safety.read(str(tmp_path / "concepts.yaml"))


def test_a_file_that_is_not_there_is_never_taken_for_no_concepts():
    with pytest.raises(FileNotFoundError, match="--concepts: there is no file 'defualt'; give `default` or a file"):
        safety.read("defualt")
