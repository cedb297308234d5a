"""Names of zero-guidance segments: the nearest word, the best caption, and what is never said of a person."""

import logging
from pathlib import Path

import numpy as np
import pytest
from support.tiny._clip import write_model

from raypipe.features.clip import Clip
from raypipe.segmenters.zero_guidance import ZeroGuidance, names
from raypipe.segmenters.zero_guidance.names import Namer, cleaned, plain_noun, read_block, read_vocabulary

WORDS = '["cat", "siamese cat", "asian woman", "homeless", "tree", "swiss roll"]'
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    folder = write_model(tmp_path_factory.mktemp("clip"))
    return Clip(folder, method="test", device="cpu", vision=False)


def vector(clip: Clip, text: str) -> np.ndarray:
    row = clip.text_features([f"Image of a {text}."])[0].numpy()
    return row / np.linalg.norm(row)


def namer(clip, candidates=(), *, naming="zerocap", vocabulary='["rock", "sea"]', **options) -> Namer:
    """One whose captions are the same for every embedding."""
    found = [list(candidates)]
    return Namer(clip, naming=naming, vocabulary=vocabulary, captions=lambda rows: found * len(rows), **options)


def test_a_name_is_the_word_of_the_highest_cosine_alone_and_in_a_batch(clip):
    rng = np.random.default_rng(0)
    words = read_vocabulary("default")[::40]
    vectors = np.stack([vector(clip, word) for word in words])
    embeddings = (vectors[:8] + 0.3 * rng.normal(size=vectors[:8].shape)).astype(np.float32) * 7
    name = Namer(clip, vocabulary=str(list(words)).replace("'", '"'))
    found = name(embeddings)
    cosines = embeddings @ vectors.T / np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert [each.text for each in found] == [words[i] for i in cosines.argmax(1)]
    np.testing.assert_allclose([each.score for each in found], cosines.max(1), atol=1e-5)
    np.testing.assert_allclose(np.stack([each.vector for each in found]), vectors[cosines.argmax(1)], atol=1e-5)
    assert not any(each.note for each in found)
    for each, row in zip(found, embeddings, strict=True):
        assert each.score == name(row[None])[0].score


def test_words_are_encoded_once_in_a_process(clip):
    once = Namer(clip, vocabulary='["pebble", "moss"]')(vector(clip, "moss")[None])[0]
    other = Clip(clip._network._path, method="test", device="cpu", vision=False)
    other._network.of_tokens = None  # what was encoded before is not asked for again
    again = Namer(other, vocabulary='["moss", "pebble"]')(once.vector[None])[0]
    assert again.text == "moss" and np.array_equal(once.vector, again.vector)


def test_without_a_segment_no_network_is_asked():
    assert Namer(None, naming="zerocap", captions=None)(np.empty((0, 24), np.float32)) == []
    assert Namer(None)(np.empty((0, 24), np.float32)) == []


def test_the_words_of_the_package_are_plain_and_none_is_blocked():
    words, block = read_vocabulary("default"), read_block("default")
    lines = names.VOCABULARY.read_text().splitlines()
    assert 2500 <= len(words) <= 4000 and len(words) == sum(bool(line) and line[0] != "#" for line in lines)
    assert list(words) == [cleaned(word) for word in words] and all(word.isascii() for word in words)
    assert not [word for word in words if block(word)]
    people = names.VOCABULARY.read_text().split("# People\n")[1].split("\n\n")[0].split("\n")
    apart = {"boxer", "shepherd", "speaker at a lectern"}  # german boxer, german shepherd, black speaker
    groups = {word for word in people if plain_noun(word) in ("", "people")}
    assert groups - apart == {
        "people",
        "group of people",
        "crowd",
        "couple",
        "family",
        "audience",
        "queue of people",
        "procession",
        "parade",
        "marching band",
        "orchestra",
        "choir",
        "team",
        "rowing team",
    }
    assert {"siamese cat", "german shepherd", "swiss roll", "sky", "tree bark", "car door"} <= set(words)


BLOCKED = {
    "asian": "Asian woman|two asians|an Asian-looking WOMEN|woman, asian|asian eating noodles|young asian|asian beauty|"
    "asian housewives|ASIAN actresses|a dog and an asian|dog and asian|six happy asians|asian photographer|"
    "asian’s face",
    "homeless": "homeless|the homeless|Homeless man on a bench|homeless shelter|home\N{SOFT HYPHEN}less",
    "african american": "African-American family|african american|African\N{NON-BREAKING HYPHEN}American men",
    "maori": "M\u0101ori woman",
    "bitch": "two bitches",
    "gypsy": "gypsies",
    "african": "drummer of african descent",
    "illegal immigrant": "illegal immigrants",
    "german": "german|old german man|a german and his dog",
    "beautiful": "beautiful young girl|beautiful",
    "black": "black man sitting|black people|black firemen",
    "slant eyed": "slant-eyed doll",
}
PASSES = (
    "siamese cat|Siamese cats|german shepherd|german shepherd beside a man|swiss roll|black dog|black and white photo|"
    "great dane|maine coon|nail polish|window blind|beautiful flower|chinese restaurant|poor quality photo of a woman|"
    "hot dog|fat cat|fat tire|white wall|asiana|woman|man with hat|german boxer|black speaker|turkish rug"
)


@pytest.mark.parametrize(("entry", "text"), [(e, t) for e, texts in BLOCKED.items() for t in texts.split("|")])
def test_what_is_never_said_of_a_person(entry, text):
    assert read_block("default")(text) == entry and read_block("none")(text) == ""


def test_what_is_said_of_something_else_passes():
    block = read_block("default")
    assert {text: block(text) for text in PASSES.split("|") if block(text)} == {}


def test_blocked_words_give_way_to_the_next_best_and_the_note_says_so(clip):
    name = Namer(clip, vocabulary=WORDS)
    rows = np.stack([vector(clip, each) for each in ("homeless", "siamese cat", "swiss roll")])
    vague, cat, roll = name(rows)
    free = ["cat", "siamese cat", "tree", "swiss roll"]
    cosines = [float(vector(clip, each) @ rows[0]) for each in free]
    assert vague.text == free[int(np.argmax(cosines))] and "label_blocked:homeless" in vague.note.split(",")
    assert vague.score == pytest.approx(max(cosines), abs=1e-5)
    assert (cat.text, cat.note, roll.text, roll.note) == ("siamese cat", "", "swiss roll", "")
    assert Namer(clip, vocabulary=WORDS, block="none")(rows)[0].text == "homeless"


def test_of_a_person_of_whom_nothing_else_may_be_said_the_plain_noun_is(clip):
    people = [f"asian {noun}" for noun in ("man", "woman", "boy", "girl", "child")]
    row = sum(vector(clip, each) for each in people)
    words = sorted(read_vocabulary("default")[::40], key=lambda each: float(vector(clip, each) @ row))
    name = Namer(clip, vocabulary=str([*people, words[0]]).replace("'", '"'))
    (found,) = name(row[None])  # of the five nearest words each is blocked
    nearest = max(people, key=lambda each: float(vector(clip, each) @ row))
    assert (found.text, found.note) == (nearest.removeprefix("asian "), "label_blocked:asian")
    assert found.score == pytest.approx(float(vector(clip, found.text) @ row / np.linalg.norm(row)), abs=1e-5)


def test_the_best_caption_is_cleaned_and_compared_as_it_is_written(clip):
    raw = [" Grey\r\n CAT..", ' a "dog" &lt;b>.', "=SUM(A1)", " cut \N{REPLACEMENT CHARACTER}", " half \ud83d.", " . "]
    clean = ["grey cat.", 'a "dog" &lt;b>', "=sum(a1)"]
    for wanted in clean:
        found = namer(clip, raw)(3 * vector(clip, wanted)[None])[0]
        assert (found.text, found.note) == (wanted, "")
        assert found.score == pytest.approx(1, abs=1e-5)
    found = namer(clip, raw)(vector(clip, " cut ")[None])[0]
    assert found.text in clean  # never one that was cut within a character


@pytest.mark.parametrize(
    ("candidates", "text", "note"),
    [
        ([".", "  ", "", "\N{REPLACEMENT CHARACTER}", "' -"], "sea", "no_candidate"),
        ([], "sea", "no_candidate"),
        (["asian woman", "asian women."], "woman", "label_blocked:asian"),
        (["homeless."], "sea", "label_blocked:homeless"),
        (["African-American", "poor"], "sea", "label_blocked:poor,label_blocked:african_american"),
        (["rich lady", "trash can"], "trash can", "label_blocked:rich"),
        (["pebble"], "pebble", ""),
    ],
)
def test_what_is_said_where_the_best_caption_may_not_be(clip, candidates, text, note):
    best = cleaned(candidates[0]) if note.startswith("label_blocked") else "sea"
    found = namer(clip, candidates)((vector(clip, best) + 0.2 * vector(clip, "sea"))[None])[0]
    assert found.text == text and set(found.note.split(",")) == set(note.split(","))
    np.testing.assert_allclose(found.vector, vector(clip, text), atol=1e-6)


def test_captions_are_asked_only_below_the_cosine(clip):
    asked = []

    def captions(rows):
        asked.append(rows)
        return [["wet stone."]] * len(rows)

    rows = np.stack([vector(clip, "sea"), 5 * vector(clip, "wet stone"), vector(clip, "rock")])
    both = {"naming": "retrieval+zerocap", "vocabulary": '["rock", "sea"]', "captions": captions}
    assert [each.text for each in Namer(clip, below=0.9999, **both)(rows)] == ["sea", "wet stone", "rock"]
    assert len(asked) == 1 and np.array_equal(asked[0], rows[1:2])
    assert {each.text for each in Namer(clip, below=-1.0, **both)(rows)} <= {"rock", "sea"} and len(asked) == 1


def test_lists_are_settled_without_their_files(tmp_path, caplog):
    words, entries = tmp_path / "words.txt", tmp_path / "block.txt"
    words.write_text("# things\nTable\n\ntable # again\n red   Chair.\nspoon rest\n", encoding="utf-8-sig")
    entries.write_text("# mine\nspoon\n!gun # anywhere\n")
    with caplog.at_level(logging.INFO):
        settled = names.settle(str(words), str(entries))
    assert "1 of 4 lines repeat a word" in caplog.text and names.settle(*settled) == settled
    assert read_vocabulary(settled[0]) == ("table", "red chair", "spoon rest") == read_vocabulary(str(words))
    block = read_block(settled[1])
    expected = {"man with gun shop": "gun", "spoon": "spoon", "spoon rest": "", "asian woman": ""}
    assert {text: block(text) for text in expected} == expected
    for kept in (("default", "default"), ("default", "none"), ("voc2012", "default")):
        assert names.settle(*kept) == kept
    assert read_vocabulary("voc2012")[0] == "aeroplane"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected one word at least, got none"),
        (b"# only\n  . \n", "expected one word at least, got none"),
        (b"caf\xe9\n", "cannot be read as a text in UTF-8"),
        (b"homeless\nAsian woman\n", "each of its words is blocked"),
    ],
)
def test_a_vocabulary_that_names_nothing_is_an_error(tmp_path, content, message):
    file = tmp_path / "words.txt"
    file.write_bytes(content)
    for settle in (lambda text: Namer(None, vocabulary=text), lambda text: ZeroGuidance(vocabulary=text)):
        with pytest.raises(ValueError, match=f"vocabulary: .*{message}"):
            settle(str(file))


def test_lists_that_are_none_are_errors(tmp_path):
    for read, option in ((read_vocabulary, "vocabulary"), (read_block, "block")):
        with pytest.raises(FileNotFoundError, match=f"{option}: there is no file 'defualt'; expected default"):
            read("defualt")
        for text in ("[1, 2]", "[cat"):
            with pytest.raises(ValueError, match=f"{option}: .*list"):
                read(text)
        with pytest.raises(ValueError, match=f"{option}: .* cannot be read"):
            read(str(tmp_path))
    Path(tmp_path / "block.txt").write_text("!\n")
    with pytest.raises(ValueError, match="block: expected words or phrases, got '!'"):
        read_block(str(tmp_path / "block.txt"))
    (tmp_path / "block.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="none blocks nothing"):
        read_block(str(tmp_path / "block.txt"))


def test_persons_have_plain_nouns():
    texts = {"Asian women": "woman", "two wives": "woman", "old guys": "man", "princesses": "woman", "cat": ""}
    texts |= {"crowd": "people", "nurse": "person", "thieves": "person"}
    assert {text: plain_noun(text) for text in texts} == texts
