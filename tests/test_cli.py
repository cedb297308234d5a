"""The command line as a user meets it."""

import json
import subprocess
import sys

import pytest
import yaml
from faulty import GOOD, write_images

from raypipe.cli import main


@pytest.fixture
def photos(tmp_path):
    write_images(tmp_path / "photos", [GOOD] * 3)
    return tmp_path / "photos"


def label(*options, photos, output="run") -> int:
    place = ["--input", str(photos), "--output", str(photos.parent / output), "--foreground", "whole", "--local"]
    return main(["label", "kmeans", *place, *options])


def test_help_shows_the_verbs_and_imports_nothing_heavy():
    code = (
        "import sys; from raypipe.cli import main; main(['--help']);"
        "heavy = {'torch', 'ray', 'cv2', 'numpy', 'pyarrow'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in ("label", "methods", "demo"))


def test_the_help_of_a_method_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["label", "kmeans", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in ("--input", "--retry-errors", "--k", "--attempts", "--foreground", "--config"):
        assert option in text
    with pytest.raises(SystemExit):
        main(["label", "kmeans", "--refine", "guided", "--help"])
    assert "--refine-radius" in capsys.readouterr().out


def test_a_run_prints_what_was_done_and_json_last(photos, capsys):
    assert label("--json", photos=photos) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("3 of 3 images labelled")
    result = json.loads(lines[-1])
    assert (result["images"], result["labelled"], result["failed"], result["exit_code"]) == (3, 3, 0, 0)
    assert label(photos=photos) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_too_many_bad_images_end_with_code_3_and_the_way_to_retry(photos, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert label(photos=photos) == 3
    text = capsys.readouterr().out
    assert "1 images failed" in text and "--retry-errors" in text and "decode: " in text
    assert label("--max-bad-fraction", "0.5", photos=photos) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lable"], "did you mean 'label'"),
        (["label", "kmean"], "kmeans"),
        (
            ["label", "kmeans", "--input", "/no/such/folder", "--output", "x", "--foreground", "whole"],
            "/no/such/folder",
        ),
        (["label", "kmeans", "--input", ".", "--output", "/tmp/x", "--foreground", "wohle"], "choose one of: grabcut"),
        (["label", "kmeans", "--input", ".", "--output", "/tmp/x", "--refine", "gf"], "choose one of: guided"),
    ],
)
def test_wrong_usage_ends_with_code_2_and_says_what_is_right(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_wrong_flags_end_with_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["label", "kmeans", "--input", "x", "--output", "y", "--attemps", "3"])
    assert end.value.code == 2
    assert "attemps" in "".join(capsys.readouterr())


def test_a_config_file_sets_options_and_flags_win(photos, capsys):
    config = photos.parent / "kmeans.yaml"
    config.write_text(
        "k: 3\nattempts: 2\nforeground: whole\nrefine: guided\nrefine_radius: 4\nlocal: true\nactors: null\n"
    )
    place = ["--input", str(photos), "--output", str(photos.parent / "run")]
    assert main(["label", "kmeans", *place, "--config", str(config), "--attempts", "5", "--print-config"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["k"], values["attempts"], values["refine_radius"], values["local"]) == (3, 5, 4, True)
    assert values["actors"] is None and values["input"] == str(photos)


def test_the_printed_config_is_a_config(photos, capsys):
    assert label("--k", "4", "--print-config", photos=photos) == 0
    config = photos.parent / "all.yaml"
    config.write_text(capsys.readouterr().out)
    assert main(["label", "kmeans", "--config", str(config), "--print-config"]) == 0
    assert capsys.readouterr().out == config.read_text()


def test_an_unknown_key_in_a_config_is_an_error_with_a_suggestion(photos, capsys):
    config = photos.parent / "wrong.yaml"
    config.write_text("atempts: 3\n")
    assert label("--config", str(config), photos=photos) == 2
    assert "unknown option 'atempts' (value 3); did you mean 'attempts'?" in capsys.readouterr().err


def test_every_method_tells_what_it_needs(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for word in ("kmeans", "watershed", "grabcut", "rembg", "needs", "licence", "source", "u2net"):
        assert word in text
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["licence"] and row["source"] and row["summary"] for row in rows)


def test_the_demo_labels_photographs_and_draws_a_sheet(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    assert (tmp_path / "demo/kmeans/sheet.png").stat().st_size > 100_000
    assert "raypipe label" in capsys.readouterr().out
