"""Lists as programs write them: rows and records that are named as left out are as many as the list has records."""

import base64
import json

import pytest
from support.sources import contents, keys, left_out, photographs, write

from raypipe.inputs.manifest import list_inputs

NAMES = ["a.jpg", "b.jpg"]


def put(folder, name: str, content: bytes | str):
    write(folder, *NAMES)
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_tab_separated_text_has_no_quoting(tmp_path):
    titles = ["plain", '"Falco" on a wire', '"never closed', "he said 'yes'", 'ends with"', '"']
    write(tmp_path, *(f"{i}.jpg" for i in range(6)))
    for name in ("media.tsv", "media.csv"):  # portals call either so
        lines = [f"{title}\t{i}.jpg" for i, title in enumerate(titles)]
        (tmp_path / name).write_text("title\turl\n" + "\n".join(lines) + "\n")
        assert contents(tmp_path / name) == [f"{i}.jpg".encode() for i in range(6)]


@pytest.mark.parametrize("name", ["list.csv", "list.txt", "list.jsonl", "list.tsv"])
@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "utf-8", "utf-16-be with mark"]
)
def test_encodings_are_recognised(encoding, name, tmp_path):
    write(tmp_path, "Füße/é.jpg", "b.jpg")
    lines = {
        "list.csv": "Größe,file_name\n1,Füße/é.jpg\n2,b.jpg\n",
        "list.tsv": "Größe\tfile_name\r\n1\tFüße/é.jpg\r\n2\tb.jpg\r\n",
        "list.txt": "Füße/é.jpg\r\nb.jpg\r\n",
        "list.jsonl": '{"file_name": "Füße/é.jpg"}\n{"file_name": "b.jpg"}\n',
    }
    mark = "\ufeff" if encoding.endswith("mark") else ""
    (tmp_path / name).write_bytes((mark + lines[name]).encode(encoding.partition(" ")[0]))
    assert contents(tmp_path / name) == ["Füße/é.jpg".encode(), b"b.jpg"]
    assert keys(tmp_path / name) == ["Füße/é.jpg", "b.jpg"]


def test_a_line_that_is_not_utf_8_is_said_and_the_others_stay_what_they_are(tmp_path, caplog):
    write(tmp_path, "é.jpg", "ü.jpg")
    path = put(tmp_path, "list.txt", "é.jpg\n".encode() + "ü.jpg\n".encode("cp1252"))
    assert contents(path) == ["é.jpg".encode(), "ü.jpg".encode()]
    assert "line 2 is not UTF-8" in caplog.text


def test_names_in_the_bytes_of_an_old_disk_are_found(tmp_path):
    name = b"caf\xe9.jpg"
    with open(tmp_path.as_posix().encode() + b"/" + name, "wb") as file:
        file.write(b"content")
    assert contents(put(tmp_path, "list.txt", name + b"\n")) == [b"content"]


@pytest.mark.parametrize(
    "text",
    [
        "file_name;label\r\na.jpg;x\r\nb.jpg;y\r\n",
        "sep=;\r\nfile_name;label\r\na.jpg;x\r\nb.jpg;y\r\n",
        '"sep=;"\r\nfile_name;label\r\na.jpg;"x;y"\r\nb.jpg;y\r\n',
        "sep=\t\nfile_name\tlabel\na.jpg\tx\nb.jpg\ty\n",
        "file_name|label\na.jpg|x,y\nb.jpg|y\n",
        "label;file_name;size\n1,5;a.jpg;2,5\n1,5;b.jpg;2,5\n",
        '"file_name","label"\n"a.jpg","x, y"\n"b.jpg","he said ""no"""\n',
        "file_name,label\ra.jpg,x\rb.jpg,y\r",
        'label,file_name\n"two\nlines",a.jpg\n\n   ,  \nx,b.jpg',
        "file_name\na.jpg\nb.jpg\n",
        " file_name , label \n a.jpg , x\n b.jpg, y\n",
        "file_name,label,\na.jpg,x,\nb.jpg,y,\n",
        "a.jpg,cat\nb.jpg,dog\n",  # without headings
        "\n\n file_name;label\na.jpg;x\nb.jpg;y\n",
    ],
)
def test_separators_line_ends_and_quotes(text, tmp_path, caplog):
    assert contents(put(tmp_path, "list.csv", text)) == [b"a.jpg", b"b.jpg"]
    assert "left out" not in caplog.text


def test_text_with_tabs_and_headings_is_a_table(tmp_path):
    path = put(tmp_path, "list.txt", "file_name\tlabel\r\na.jpg\tx\r\nb.jpg\ty\r\n".encode("utf-16"))
    assert contents(path) == contents(path, column="file_name") == [b"a.jpg", b"b.jpg"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('label,file_name\nx,a.jpg\n"open,b.jpg\ny,c.jpg\n', 3),
        ('file_name,label\na.jpg,"x\n', 2),
        ('"file_name\na.jpg\n', 1),
    ],
)
def test_a_quotation_mark_that_is_never_closed_is_an_error_with_its_line(text, line, tmp_path):
    with pytest.raises(ValueError, match=rf"list\.csv: line {line}: .*none closes it"):
        list_inputs(str(put(tmp_path, "list.csv", text)))


def test_records_without_an_image_are_counted_with_the_first_line(tmp_path, caplog):
    path = put(tmp_path, "list.csv", "label,file_name\nx,a.jpg\nonly\ny,\nz,b.jpg\nx,b.jpg,and,more\n")
    assert contents(path) == [b"a.jpg", b"b.jpg"]
    reasons = {"2 records without image (first: line 3)", "1 record with more fields than columns (first: line 6)"}
    assert left_out(caplog) == reasons


def test_json_lines_of_all_kinds(tmp_path, caplog):
    write(tmp_path, *(f"{i}.jpg" for i in range(8)))
    records = [
        {"image": "0.jpg"},
        {"id": 1, "conversations": []},
        {"image": None},
        {"image": {"path": "1.jpg", "bytes": None}},
        {"image": {"url": "2.jpg"}},
        {"image": ["3.jpg", "4.jpg"]},
        {"image": [{"path": "5.jpg"}]},
        {"image": float("nan")},
        {"image": 17},
        {"image": ""},
        {"image": []},
        {"image": {"id": 3}},
        {"image": "6.jpg"},
    ]
    text = "\n\n".join(map(json.dumps, records))
    assert keys(put(tmp_path, "list.jsonl", text)) == [f"{i}.jpg" for i in range(7)]
    assert left_out(caplog) == {
        "5 records without image (first: line 3)",
        "1 record with a number in 'image' (first: line 17)",
        "1 record with an object without bytes or path in 'image' (first: line 23)",
    }
    caplog.clear()
    assert keys(put(tmp_path, "list.json", json.dumps(records))) == [f"{i}.jpg" for i in range(7)]
    assert any("first: entry 2" in reason for reason in left_out(caplog))


def test_json_may_be_a_list_of_addresses_or_what_coco_has(tmp_path):
    assert contents(put(tmp_path, "list.json", json.dumps(NAMES))) == [b"a.jpg", b"b.jpg"]
    coco = {"info": {}, "images": [{"id": i, "file_name": name} for i, name in enumerate(NAMES)], "annotations": []}
    assert contents(put(tmp_path, "coco.json", json.dumps(coco))) == [b"a.jpg", b"b.jpg"]
    assert contents(put(tmp_path, "lines.ndjson", '"a.jpg"\n"b.jpg"\n')) == [b"a.jpg", b"b.jpg"]
    with pytest.raises(ValueError, match="named images"):
        list_inputs(str(put(tmp_path, "list.json", "{}")))
    for name in ("list.json", "list.jsonl"):
        with pytest.raises(ValueError, match="not JSON: .*line 1"):
            list_inputs(str(put(tmp_path, name, '{"image": "a.jpg"')))


def test_a_record_without_image_may_be_the_first_thousand(tmp_path, caplog):
    lines = [json.dumps({"text": i}) for i in range(2500)] + [json.dumps({"text": 0, "image": "a.jpg"})]
    assert contents(put(tmp_path, "list.jsonl", "\n".join(lines))) == [b"a.jpg"]
    assert left_out(caplog) == {"2,500 records without image (first: line 1)"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("form", ["base64", "data URI", "url-safe", "line breaks", "bytes in an object", "slashes"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
def test_a_picture_as_text_is_decoded_and_never_a_key(form, suffix, encoding, tmp_path):
    pictures = photographs(tmp_path / "photos", 2)
    texts = [base64.b64encode(picture).decode() for picture in pictures]
    if form == "data URI":
        texts = ["data:image/jpeg;base64," + text for text in texts]
    if form == "url-safe":
        texts = [base64.urlsafe_b64encode(picture).decode().rstrip("=") for picture in pictures]
    if form == "line breaks":
        texts = [base64.encodebytes(picture).decode() for picture in pictures]
    if form == "bytes in an object" and suffix != ".jsonl" or (form == "line breaks" and suffix == ".txt"):
        return
    if suffix == ".jsonl":
        cells = [{"bytes": text, "path": "x.jpg"} if "object" in form else text for text in texts]
        text = "\n".join(json.dumps({"id": i, "image": cell}) for i, cell in enumerate(cells))
        text = text.replace("/", "\\/") if form == "slashes" else text
    else:
        heading = "id,image\n" if suffix == ".csv" else ""
        lines = (f'{i},"{each}"' if suffix == ".csv" else each for i, each in enumerate(texts))
        text = heading + "\n".join(lines)
    path = put(tmp_path, f"list{suffix}", text.encode(encoding))
    assert contents(path, max_bytes=10**6) == pictures
    assert all(len(key) < 10 for key in keys(path))
    assert [error.kind for error in contents(path, max_bytes=100)] == ["too_large"] * 2


def test_text_that_is_no_address_is_counted(tmp_path, caplog):
    path = put(
        tmp_path, "list.jsonl", "\n".join(json.dumps({"image": each}) for each in ("a.jpg", "x y " * 2000, "p\nq"))
    )
    assert contents(path) == [b"a.jpg"]
    assert left_out(caplog) == {"2 records with text that is no address in 'image' (first: line 2)"}


def test_cut_base64_is_an_error_row(tmp_path):
    (picture,) = photographs(tmp_path / "photos", 1)
    text = base64.b64encode(picture).decode()
    path = put(tmp_path, "list.jsonl", json.dumps({"image": text[:-7] + "!" + text[-6:]}))
    (error,) = contents(path, max_bytes=10**6)
    assert (error.kind, "base64" in error.message) == ("invalid", True)


def test_a_picture_is_no_list(tmp_path):
    (picture,) = photographs(tmp_path / "photos", 1)
    for name in ("list.txt", "list.csv", "list.jsonl"):
        with pytest.raises(ValueError, match="no text|null characters|UTF-16"):
            list_inputs(str(put(tmp_path, name, picture + bytes(64))))


def test_an_empty_list_says_what_it_left_out(tmp_path):
    with pytest.raises(ValueError, match=r"left out: 2 records without image \(first: line 2\)"):
        list_inputs(str(put(tmp_path, "list.csv", "id,image\n1,\n2,\n")))
    for name in ("list.csv", "list.txt", "list.jsonl"):
        with pytest.raises(ValueError, match="no images"):
            list_inputs(str(put(tmp_path, name, "")))
