"""RAY_ADDRESS where no cluster answers, and paths in submitted jobs."""

import socket
import time

import pytest
from support.faulty import GOOD, write_images

from raypipe.cli.verbs import main
from raypipe.pipeline.job import Label
from raypipe.run import Run
from raypipe.runtime import address
from raypipe.storage import Folder
from raypipe.storage.uri import SUBMITTED


@pytest.fixture
def silent_port():
    """A port that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("127.0.0.1:1", "no Ray answers there (Connection refused)"),
        ("ray://127.0.0.1:1", "no Ray answers there (Connection refused)"),
        ("no-such-host.invalid:6379", "no Ray answers there ("),
        ("http://127.0.0.1:8265", "is the address of a job server: use it with `ray job submit --address`"),
        ("127.0.0.1", "expected HOST:PORT"),
        ("127.0.0.1:99999", "no Ray answers there"),
    ],
)
def test_a_stale_address_is_one_sentence_with_the_way_out(given, message, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(ValueError) as caught:
        address.check()
    text = str(caught.value)
    assert text.startswith(f"RAY_ADDRESS {given!r}") and message in text and "\n" not in text
    assert text.endswith("or unset RAY_ADDRESS")


def test_what_answers_but_is_no_ray_is_given_up(silent_port, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent_port}")
    monkeypatch.setattr(address, "JOIN_SECONDS", 2.0)
    start = time.monotonic()
    with pytest.raises(ValueError, match="what answers there is no Ray cluster; give HOST:PORT of a running head"):
        address.check()
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("given", ["", "local"])
def test_without_an_address_nothing_is_joined(given, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert not address.joins_cluster()
    address.check()


def test_the_command_says_so_before_ray_says_anything(tmp_path, monkeypatch, capfd):
    write_images(tmp_path / "photos", [GOOD])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    place = ["--input", str(tmp_path / "photos"), "--output", str(tmp_path / "run")]
    assert main(["label", "kmeans", *place, "--foreground", "grabcut"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("raypipe: RAY_ADDRESS '127.0.0.1:1': no Ray answers there (Connection refused); give")
    assert not any("gcs" in line.lower() or "rpc" in line.lower() for line in lines)


# Paths


def test_a_folder_is_the_same_from_any_other_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, run = Folder("runs/a"), Run("runs/a", "kmeans")
    monkeypatch.chdir("/")
    assert folder.uri == run.folder.uri == str(tmp_path / "runs/a")
    folder.write(b"x", "note")
    assert (tmp_path / "runs/a/note").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["label", "kmeans", "--input", "{here}/photos", "--output", "runs/a"], "runs/a"),
        (["label", "kmeans", "--input", "photos", "--output", "{here}/a"], "photos"),
        (["label", "kmeans", "--input", "{here}/photos", "--output", "{here}/a", "--foreground", "given:fg"], "fg"),
        (["label", "kmeans", "--input", "{here}/photos", "--output", "{here}/a", "--foreground", "run:fg"], "fg"),
        (["sweep", "kmeans", "--input", "{here}/photos", "--labels", "masks", "--output", "{here}/s", "--over", "k=2"]
         , "masks"),
        (["evaluate", "runs/a", "--labels", "{here}/photos"], "runs/a"),
        (["benchmark", "--only", "help"], "raypipe-benchmark"),
        (["demo"], "raypipe-demo/tokencut"),
    ],
)  # fmt: skip
def test_a_submitted_job_refuses_relative_paths(words, given, tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "photos", [GOOD])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SUBMITTED, "{}")
    assert main([word.replace("{here}", str(tmp_path)) for word in words]) == 2
    text = capsys.readouterr().err
    assert f"the path {given!r} is relative, but a submitted job runs in {tmp_path}, which Ray deletes" in text
    assert text.endswith("give an absolute path or a URI\n")


def test_a_submitted_job_takes_absolute_paths_uris_and_the_config_beside_it(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "photos", [GOOD])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coat.yaml").write_text(f"input: {tmp_path}/photos\nforeground: whole\nlocal: true\n")
    monkeypatch.setenv(SUBMITTED, "{}")
    assert main(["label", "kmeans", "--config", "coat.yaml", "--output", f"file://{tmp_path}/run"]) == 0
    assert (tmp_path / "run/run.json").exists()


def test_the_options_of_a_run_in_its_record_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Run(Label("photos", "runs/a").output).folder.uri == str(tmp_path / "runs/a")
