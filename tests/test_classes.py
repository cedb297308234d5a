"""Class lists: one grammar for data sets, files and names, and what is refused."""

import json

import pytest

from raypipe import classes
from raypipe.classes import Category

ENTRIES = "- cat\n- {name: crane, query: crane bird}\n- name: crane\n  query: tower crane\n"


def test_lists_of_data_sets_hold_what_the_reference_holds(shared):
    stored = json.loads((shared / "data" / "segmentation_label_maps.json").read_text())
    assert classes.names() == list(stored)
    for name, expected in stored.items():
        found, facts = classes.read(name), classes.facts(name)
        assert found.source == name and [each.name for each in found.categories] == expected["classes"][1:]
        assert facts["ignore_index"] == expected["ignore_index"]
        assert facts.get("wnids") == expected.get("wnids")
        ids = expected.get("source_category_ids") or expected.get("source_label_ids")
        assert facts.get("source_ids") == ids
        queries = {int(i): query for i, query in expected.get("queries", {}).items()}
        plain = expected.get("prompt_names", {})
        wanted = [queries.get(i) or plain.get(each, each) for i, each in enumerate(expected["classes"]) if i]
        assert list(found.queries) == wanted
        assert facts["aliases"].keys() >= expected.get("file_name_aliases", {}).keys()


@pytest.mark.parametrize("name", classes.names())
def test_a_known_list_is_whole_and_tells_its_categories_apart(name):
    found, facts = classes.read(name), classes.facts(name)
    count = {"imagenet_s50": 50, "imagenet_s300": 300, "imagenet_s919": 919, "pascal_context_59": 59}
    assert len(found.categories) == count.get(name, {"voc2012": 20, "cityscapes_object": 14}.get(name, 80))
    for texts in (found.names, found.queries):
        assert len({classes.normalised(text) for text in texts}) == len(found.categories)
    for key in facts.keys() & {"wnids", "source_ids"}:
        assert len(facts[key]) == len(found.categories) and facts[key] == sorted(facts[key])
    assert set(facts["aliases"].values()) <= set(found.names)
    assert facts["ignore_index"] > len(found.categories)
    assert classes.settle(name) == name


def test_imagenet_names_both_cranes_and_both_cardigans():
    found = classes.read("imagenet_s919")
    doubled = {i + 1: each for i, each in enumerate(found.categories) if each.name.lower() in ("crane", "cardigan")}
    assert doubled == {
        135: Category("crane", "crane bird"),
        265: Category("Cardigan", "cardigan welsh corgi"),
        463: Category("cardigan", "cardigan sweater"),
        496: Category("crane", "tower crane"),
    }
    assert found.names[134] == "crane bird" and found.names[495] == "tower crane"  # rows name them apart


def test_imagenet_without_its_queries_is_refused_and_both_pairs_are_named(tmp_path):
    (tmp_path / "all.txt").write_text("\n".join(each.name for each in classes.read("imagenet_s919").categories) + "\n")
    with pytest.raises(ValueError) as refusal:
        classes.read(str(tmp_path / "all.txt"))
    text = str(refusal.value)
    assert "'crane' (135) and 'crane' (496)" in text and "'Cardigan' (265) and 'cardigan' (463)" in text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.txt", "# animals\ncat\nsnow_leopard\nD&amp;D dice\n"),
        ("names", "\ufeffcat\r\nsnow_leopard\r\nD&amp;D   dice\r\n\r\n"),
        ("names.yaml", "- cat\n- {name: snow_leopard}\n- D&D dice\n"),
        ("names.txt", "# animals\n- cat\n- snow_leopard\n- D&D dice\n"),
        ("names.json", '["cat", "snow_leopard", {"name": "D&amp;D dice", "query": "D&D dice"}]'),
    ],
)
def test_files_and_texts_mean_the_same_and_settle_to_the_same(file, content, tmp_path):
    (tmp_path / file).write_bytes(content.encode())
    found = classes.read(str(tmp_path / file))
    assert found.names == found.queries == ("cat", "snow_leopard", "D&D dice")
    for text in ("cat, snow_leopard ,D&amp;D dice", "[cat, snow_leopard, D&D dice]"):
        assert classes.read(text) == found
        assert classes.settle(text) == classes.settle(str(tmp_path / file))
    assert classes.read(classes.settle(str(tmp_path / file))) == found


def test_names_on_lines_may_have_commas(tmp_path):
    (tmp_path / "names.txt").write_text("tench, Tinca tinca\ngoldfish\n")
    assert classes.read(str(tmp_path / "names.txt")).names == ("tench, Tinca tinca", "goldfish")


def test_entries_give_queries_and_equal_names_are_told_apart(tmp_path):
    (tmp_path / "c.yaml").write_text(ENTRIES)
    found = classes.read(str(tmp_path / "c.yaml"))
    assert found.queries == ("cat", "crane bird", "tower crane") == found.names
    assert [each.name for each in found.categories] == ["cat", "crane", "crane"]
    settled = classes.settle(str(tmp_path / "c.yaml"))
    (tmp_path / "c.yaml").unlink()
    assert classes.read(settled) == found and classes.settle(settled) == settled


def test_every_scalar_of_a_list_stays_a_text():
    text = '[no, 1984, 0x10, null, 2020-01-01, "a, b", Hängebrücke 🌉]'
    found = classes.read(text)
    assert found.names == ("no", "1984", "0x10", "null", "2020-01-01", "a, b", "Hängebrücke 🌉")
    assert classes.read(classes.settle(text)) == found


def test_one_word_is_one_category(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    monkeypatch.chdir(tmp_path)
    assert classes.read("cat").names == ("cat",)
    assert classes.read("tv/monitor").names == ("tv/monitor",)
    assert classes.read("cocoa").names == ("cocoa",)  # as near to `coca` as a typing error would be
    assert classes.read("[voc2021]").names == ("voc2021",)
    assert classes.read("co").names == ("co",)
    many = [f"a category whose number is {i}" for i in range(900)]  # longer than any path may be
    assert classes.read(",".join(many)).names == tuple(many)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one category at least, got none"),
        ("  ", "expected one category at least"),
        ("[]", "expected one category at least"),
        ("cat,,dog", "category 2 of the names has an empty name or query"),
        ("cat,-_", "category 2 of the names has an empty name"),
        ("[cat, '']", "category 2 of the list has an empty name"),
        ("[{name: cat, query: ' '}]", "category 1 of the list has an empty name or query"),
        ("cat,dog,Cat", r"the same about 'cat' \(1\) and 'Cat' \(3\) of the names; give each a query"),
        ("sea_lion,Sea-Lion", r"'sea_lion' \(1\) and 'Sea-Lion' \(2\)"),
        ("[{name: a, query: x}, {name: b, query: X}]", r"the same about 'a' \(1\) and 'b' \(2\)"),
        (
            "[{name: crane, query: bird}, {name: crane, query: tower}, {name: bird, query: z}]",
            r"categories 1 and 3 \('bird'\) of the list could not be told apart by name",
        ),
        ("[{nom: cat}]", "must be a name, or an entry of name and query, got {'nom': 'cat'}"),
        ("[[cat]]", r"category 1 of the list must be a name, or an entry of name and query, got \['cat'\]"),
        ("[cat", "the list cannot be read as YAML"),
        ("[!!python/object/apply:os.getcwd []]", "must be a name"),
        ("voc2021", r"'voc2021' is no list of a data set; did you mean 'voc2012'\? Or write \[voc2021\]"),
        ("VOC2012", r"'VOC2012' is no list of a data set; did you mean 'voc2012'\? Or write \[VOC2012\]"),
        ("coco", r"'coco' is no list of a data set; did you mean 'coco2017'\? Or write \[coco\]"),
        ("ImageNet-S50", "did you mean 'imagenet_s50'"),
        ('cat,"a, b"', r'names separated by commas have no quotes; write \["a, b", c\]'),
        ("cat,dog\x7f", r"category 2 of the names has the control character '\\x7f'; take it out"),
    ],
)
def test_what_gives_no_classes_is_refused(text, message):
    with pytest.raises(ValueError, match=f"classes: .*{message}|classes: {message}"):
        classes.read(text)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b"", "expected one category at least"),
        ("a.txt", b"cat\n\ndog\n", "category 2 of .*a.txt has an empty name"),
        ("a.txt", b"cat\n\xff\n", "cannot be read as a text of names"),
        ("a.txt", b"cat,dog\n", "has commas where a name per line was expected; write a line for each"),
        ("a.csv", b"name,query\ncrane,crane bird\n", "has commas where a name per line was expected"),
        ("a.yaml", b"cat: 1\n", "must be a list of names, or of entries of name and query, got a dict"),
        ("a.yaml", b"- [\n", "cannot be read as YAML"),
    ],
)
def test_files_that_give_no_classes_are_refused(file, content, message, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"classes: .*{message}|classes: {message}"):
        classes.read(str(tmp_path / file))
    with pytest.raises(ValueError, match="classes: .* cannot be read"):
        classes.read(str(tmp_path))


def test_an_absent_file_is_no_category():
    for text in ("animals.txt", "./animals", "~/lists/animals", "/lists/animals", "s3://bucket/animals.txt"):
        with pytest.raises(FileNotFoundError, match=rf"there is no local file '{text}'; write \[{text}\]"):
            classes.read(text)
    with pytest.raises(ValueError, match="unknown class list 'voc2021'; did you mean 'voc2012'"):
        classes.facts("voc2021")
