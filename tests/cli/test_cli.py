"""The command line as a user meets it."""

import dataclasses
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections import Counter

import pytest
import tyro
import yaml
from support.archives import make as make_archive
from support.faulty import GOOD, write_images

import raypipe
from raypipe import refiners, segmenters
from raypipe.cli import verbs as cli
from raypipe.cli.config import ROOMS, Terminal, first_word
from raypipe.cli.verbs import main


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


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_each_verb_has_an_example_that_works_and_no_jargon(verb, capsys):
    words = [verb, *{"method": ["kmeans"], "recipe": ["sempart"]}.get(first_word(cli.VERBS[verb].parts), [])]
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert not re.search(r"{None}\||\[\[|\((GloPER|reference|official|supplement)", text)
    assert_examples_work(text, verb)


def assert_examples_work(text: str, verb: str) -> None:
    """All command lines in a help text are understood."""
    for example in (lines := {line.strip() for line in text.splitlines() if line.startswith("  raypipe ")}):
        program, *typed = shlex.split(example)
        assert program == "raypipe" and typed[0] == verb.split()[0] and main([*typed, "--print-config"]) == 0
    assert lines


@pytest.mark.parametrize(
    ("words", "part"),
    [
        *((["label", name], f"raypipe label {name} ") for name in segmenters.names()),
        *((["sweep", name, "--train"], f"raypipe sweep {name} --train ") for name in ROOMS["recipe"].names()),
        (["sweep", "namedmask", "--train"], " --archive archive/ --masks runs/tokencut --dataset voc2012 "),
        (["label", "reco"], " --weights weights/reco"),
        (["train", "reco"], "reco --archive archive/ --output "),
        (["train", "namedmask"], " --archive archive/ --masks "),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, list) else "",
)
def test_the_examples_of_every_method_work(words, part, photos, capsys, monkeypatch):
    make_archive(photos.parent / "archive", {"cat": list(photos.glob("*.png"))})
    monkeypatch.chdir(photos.parent)
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert part in text
    assert_examples_work(text, words[0])


def test_help_is_a_word_too(capsys):
    assert main(["help"]) == 0
    everything = capsys.readouterr().out
    assert main(["--help"]) == 0 and capsys.readouterr().out == everything
    assert main(["help", "label"]) == 0
    assert "For example:\n  raypipe label kmeans --input photos/" in capsys.readouterr().out


def test_the_help_leaves_out_what_a_method_refuses(capsys):
    for words, is_there in (["kmeans"], False), (["kmeans", "--refine", "guided"], True), (["gloper"], True):
        with pytest.raises(SystemExit):
            main(["label", *words, "--help"])
        assert ("--threshold" in capsys.readouterr().out) == is_there


def test_methods_lists_the_named_ones(capsys):
    assert main(["methods", "watershed", "kmeans", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["watershed", "kmeans"]


def test_decoding_anything_but_a_row_says_what_a_row_is(photos):
    assert label(photos=photos) == 0
    rows = raypipe.load(str(photos.parent / "run"))
    for given in (rows, rows.to_pylist()):
        with pytest.raises(TypeError, match="decode: expected one row as a dict, such as those of raypipe.load"):
            raypipe.decode(given)


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
    assert text.startswith("4 of 4 images done in ") and ": 3 labelled, 1 failed\n1 image failed in this run" in text
    assert text.count("--retry-errors") == 1 and "decode: " in text
    assert "exit code 3: 1 of 4 images failed (25%), more than --max-bad-fraction 0.05 allows" in text
    assert label(photos=photos) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert label("--max-bad-fraction", "0.5", "--retry-errors", photos=photos) == 0
    text = capsys.readouterr().out
    assert text.startswith("1 of 4 images done in ") and ": 0 labelled, 1 failed\n" in text
    assert "--retry-errors" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lable"], "did you mean 'label'"),
        (["label", "kmean"], "kmeans"),
        (
            ["label", "kmeans", "--input", "/no/such/folder", "--output", "/tmp/x", "--foreground", "whole"],
            "raypipe: /no/such/folder does not exist\n",
        ),
        (["demo", "--config", "/no/such.yaml"], "raypipe: --config /no/such.yaml: No such file or directory\n"),
        (["demo", "--config", "/"], "raypipe: --config /: Is a directory\n"),
        (
            ["label", "kmeans", "--input", ".", "--output", "/tmp/x", "--refine-radius", "4"],
            "raypipe: --refine-radius has no effect without a refiner; add --refine guided\n",
        ),
        (["label", "kmeans", "--input", ".", "--output", "/tmp/x", "--foreground", "wohle"], "choose one of: grabcut"),
        (
            ["label", "kmeans", "--input", ".", "--output", "/tmp/x", "--refine", "gf"],
            "choose one of: bilateral, crf, guided",
        ),
    ],
)
def test_wrong_usage_ends_with_code_2_and_says_what_is_right(argv, message, capsys):
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert message in text and "goes on" not in text


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


@pytest.mark.parametrize("refiner", [[], *(["--refine", name] for name in refiners.names())])
def test_the_printed_config_is_a_config(refiner, photos, capsys):
    assert label("--k", "4", *refiner, "--print-config", photos=photos) == 0
    config = photos.parent / "all.yaml"
    config.write_text(capsys.readouterr().out)
    assert main(["label", "kmeans", "--config", str(config), "--print-config"]) == 0
    assert capsys.readouterr().out == config.read_text()


@pytest.mark.parametrize(
    "over", [["--over", "k=2,3", "--over", "eps=1,2"], ["--over=k=2,3", "--json", "--over=eps=1,2"]]
)
def test_a_list_given_in_several_places_is_one_list_and_of_other_options_the_last_wins(over, capsys):
    place = ["kmeans", "--input", "photos", "--labels", "labels", "--output", "swept", "--k", "3", "--k=4"]
    assert main(["sweep", *place, *over, "--print-config"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["over"] == ["k=2,3", "eps=1,2"] and found["k"] == 4


def test_the_printed_config_of_a_command_with_words_that_stand_alone_is_a_config_too(tmp_path, capsys):
    assert main(["evaluate", "runs/a", "--labels", "labels", "runs/b", "--print-config"]) == 0
    config = tmp_path / "evaluate.yaml"
    config.write_text(capsys.readouterr().out)
    for words, runs in ([], ["runs/a", "runs/b"]), (["runs/c"], ["runs/c"]):
        assert main(["evaluate", "--config", str(config), *words, "--print-config"]) == 0
        found = yaml.safe_load(capsys.readouterr().out)
        assert found["runs"] == runs and found["labels"] == "labels"


@pytest.mark.parametrize("words", [["--preset", "fast"], ["--preset=fast"]])
def test_a_preset_on_the_command_line_goes_before_the_values_of_a_config(words, tmp_path, capsys):
    place = ["gloper", "--input", str(tmp_path), "--output", str(tmp_path / "run")]
    assert main(["label", *place, "--tau", "0.5", "--print-config"]) == 0
    config = tmp_path / "balanced.yaml"
    config.write_text(capsys.readouterr().out)
    assert main(["label", "gloper", "--config", str(config), *words, "--steps", "7", "--print-config"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["preset"], found["size"], found["local_sizes"]) == ("fast", 128, [8])
    assert (found["steps"], found["tau"], found["output"]) == (7, 0.5, str(tmp_path / "run"))


def test_an_unknown_key_in_a_config_is_an_error_with_a_suggestion(photos, capsys):
    config = photos.parent / "wrong.yaml"
    config.write_text("atempts: 3\n")
    assert label("--config", str(config), photos=photos) == 2
    assert "unknown option 'atempts' (value 3); did you mean 'attempts'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("input: [a, b]", "option 'input': expected text, got ['a', 'b']"),
        ('local: "yes"', "option 'local': expected true or false, got 'yes'"),
        ("k: many", "option 'k': expected a whole number, got 'many'"),
        (
            "refine_radius: 4",
            "option 'refine_radius' (value 4) has no effect without a refiner; set refine to 'guided'",
        ),
        ("config: other.yaml", "a config file cannot name another one, got config: 'other.yaml'"),
        ("k: [", "not valid YAML"),
    ],
)
def test_a_wrong_config_is_named_with_the_option(line, message, photos, capsys):
    config = photos.parent / "wrong.yaml"
    config.write_text(line + "\n")
    assert label("--config", str(config), photos=photos) == 2
    assert capsys.readouterr().err.startswith(f"raypipe: --config {config}: {message}")


def test_a_config_may_hold_what_the_command_itself_takes_and_numbers_like_1e_3(photos, capsys):
    config = photos.parent / "all.yaml"
    config.write_text("json: true\ndebug: false\nrefine: guided\nrefine_eps: 1e-3\neps: 2\n")
    assert label("--config", str(config), photos=photos) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["labelled"] == 3
    run = json.loads((photos.parent / "run/run.json").read_text())
    assert (run["settings"]["refine_eps"], run["settings"]["eps"]) == (0.001, 2.0)


def test_a_config_may_say_tiles_as_a_command_line_does(photos, capsys):
    config = photos.parent / "tiles.yaml"
    config.write_text("tiles: 512:32\nk: 3\n")  # to YAML 1.1 a number of base 60
    assert label("--config", str(config), "--print-config", photos=photos) == 0
    assert "tiles: '512:32'\n" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["flag", "config"])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(where, photos, capsys):
    config = photos.parent / "debug.yaml"
    config.write_text("debug: true\n")
    extra = ["--debug"] if where == "flag" else ["--config", str(config)]
    assert label(*extra, "--limit", "0", photos=photos) == 2
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text and text.endswith("raypipe: --limit must be positive, got 0\n")
    assert label("--limit", "0", photos=photos) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_that_goes_on_is_shown_only_where_a_run_has_begun(photos, capsys, monkeypatch):
    def breaks(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("raypipe.pipeline.label.list_images", breaks)
    assert label(photos=photos) == 1
    assert capsys.readouterr().err == "raypipe: No space left on device\n"
    monkeypatch.undo()
    assert label("--limit", "1", photos=photos) == 0
    monkeypatch.setattr("raypipe.pipeline.label.list_images", breaks)
    assert label(photos=photos) == 1
    text = capsys.readouterr().err
    assert "what is committed is kept; once the cause is gone, this command goes on:\n  raypipe label kmeans" in text
    monkeypatch.setattr("raypipe.pipeline.dry_run.list_images", breaks)
    assert label("--dry-run", photos=photos) == 1
    assert "goes on" not in capsys.readouterr().err
    monkeypatch.setattr("raypipe.cli.demo.demo", breaks)
    assert main(["demo", "--output", str(photos.parent / "demo")]) == 1
    assert "goes on" not in capsys.readouterr().err


def test_credentials_are_left_out_of_the_command_that_goes_on():
    words = ["kmeans", "--input", "s3://key:se%2Fcret@bucket/a b?region=eu-west-1", "--output=s3://k:secret@bucket/out"]
    words += ["--foreground", "given:https://u:secret@host.org/masks", "--column", "x"]
    text = cli._typed("label", words)
    assert "secret" not in text and "se%2Fcret" not in text and "k:" not in text
    assert text.startswith("raypipe label kmeans --input 's3://bucket/a b?region=eu-west-1' --output=s3://bucket/out ")
    assert "given:https://host.org/masks --column x" in text
    assert text.endswith("# with the credentials, which are left out here")
    assert "secret" not in cli._typed("label", ["--foreground", "given:ink:s3://k:secret@bucket/masks"])
    words = ["kmeans", "--input", "abfs://container@account.dfs.core.windows.net/x", "--output", "runs/a"]
    assert cli._typed("label", words) == " ".join(["raypipe", "label", *words])


def test_the_script_for_ray_job_submit_names_itself_in_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jobs/label.py", "kmeans"])
    assert cli._typed("label", ["kmeans", "--output", "x"]) == "python jobs/label.py kmeans --output x"


def test_an_output_that_is_a_file_is_named(photos, capsys):
    (photos.parent / "run").touch()
    assert label(photos=photos) == 2
    assert f"the output '{photos.parent}/run' is a file or lies below one; choose a folder" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_output_is_named_with_what_to_do(photos, capsys):
    (photos.parent / "locked").mkdir(mode=0o555)
    assert label(photos=photos, output="locked/run") == 1
    text = capsys.readouterr().err
    assert f"{photos.parent}/locked" in text and "change the folder's owner or mode" in text and "goes on" not in text


KINDS = [Terminal, *(room.find(name) for room in ROOMS.values() for name in room.names())]
KINDS += [verb.load(name)[1] for name, verb in cli.VERBS.items()]


@pytest.mark.parametrize("verb", [name for name, verb in cli.VERBS.items() if verb.parts])
def test_no_two_parts_of_a_command_share_an_option(verb):
    parts = [list(map(ROOMS[part].find, ROOMS[part].names())) for part in cli.VERBS[verb].parts]
    options = cli.VERBS[verb].load(verb)[1]
    for kinds in itertools.product([options], [Terminal], *parts):
        names = Counter(field.name for kind in kinds for field in dataclasses.fields(kind))
        shared = {name for name, count in names.items() if count > 1}
        # a sweep's method and its task compare with one CLIP
        assert shared <= ({"clip"} if {"method", "task"} <= {*cli.VERBS[verb].parts} else set()), kinds


@pytest.mark.filterwarnings("ignore:get_parser:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_option_has_a_help_text(kind):
    actions = tyro.extras.get_parser(kind)._actions
    texts = {action.dest: re.sub(r"\((default: .*|required|repeatable)\)", "", action.help or "") for action in actions}
    assert len(texts) >= len(dataclasses.fields(kind)) and all(text.strip() for text in texts.values()), texts


@pytest.mark.parametrize("method", ["kmeans", "watershed"])
def test_the_help_shows_what_a_foreground_may_be(method, capsys):
    with pytest.raises(SystemExit):
        main(["label", method, "--help"])
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for part in ("rembg[:model or file.onnx]", "grabcut", "whole", "given:DIR", "run:DIR"):
        assert part in text.partition("--foreground")[2]


def test_a_config_file_may_be_a_pipe(photos):
    pipe = photos.parent / "config"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=["k: 3\nforeground: whole\nlocal: true\n"])
    writer.start()  # what it writes can be read once, as that of `<(...)` in a shell
    assert label("--config", str(pipe), photos=photos) == 0
    writer.join(timeout=10)
    settings = json.loads((photos.parent / "run/run.json").read_text())["settings"]
    assert settings["k"] == 3 and settings["foreground"] == "whole"


def test_every_method_tells_what_it_needs(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for word in ("kmeans", "watershed", "grabcut", "rembg", "needs", "licence", "source", "u2net"):
        assert word in text
    assert all(f"\n{name} " in f"\n{text}" for name in segmenters.names())  # a column of its own
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["licence"] and row["source"] and row["summary"] for row in rows)
    using_gpus = {row["name"] for row in rows if "a GPU is used" in row["needs"]}
    assert using_gpus == {name for name in segmenters.names() if segmenters.find(name)().gpus}


def test_the_demo_labels_photographs_and_ends_with_its_page(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    for run in ("kmeans", "tokencut"):
        assert (tmp_path / f"demo/{run}/sheet.png").stat().st_size > 100_000
        assert not any(row["error"] for row in raypipe.load(str(tmp_path / f"demo/{run}")).to_pylist())
    page, text = (tmp_path / "demo/report.html").read_text(), capsys.readouterr().out
    assert str(tmp_path / "demo/report.html") in text and all(
        name in page for name in ("chelsea.png", "motorcycle.png")
    )
    commands = re.findall(r"  raypipe (\w.*)$", text, re.MULTILINE)
    assert len(commands) == 6 and all(main([*shlex.split(words), "--print-config"]) == 0 for words in commands)
