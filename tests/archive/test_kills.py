"""Archives that end before any one of their writes, or whose drivers are killed: the same bytes as undisturbed."""

import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from support.attempts import Killed, end_before
from support.corpora import contents, draw, wanted
from support.jobs import finish, wait_until
from support.tiny import _clip

from raypipe.archive.archive import archive
from raypipe.cli.verbs import main
from raypipe.run import Run, new_attempt
from raypipe.storage import Folder, hold

CATEGORIES = "cat,dog,tree frog,bird,fish"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _clip.write_model(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_an_end_before_any_write_changes_nothing_in_the_end(tmp_path, model, monkeypatch, one_thread, first):
    draw(tmp_path / "photos", range(3))
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    archive(wanted(tmp_path / "photos", tmp_path / "alone", model, local=True))
    for count in range(first, 60, 3):
        job = wanted(tmp_path / "photos", tmp_path / f"out{count}", model, local=True)
        with monkeypatch.context() as patched:
            end_before(count, patched)
            try:
                archive(job)
                break
            except Killed:
                pass
        archive(job)
        assert contents(tmp_path / f"out{count}") == contents(tmp_path / "alone")
    assert count >= 13, "it wrote fewer files than a run and an archive have"


def test_a_second_job_on_one_output_ends_with_code_4(tmp_path, model, capsys):
    draw(tmp_path / "photos", range(2))
    words = ["--input", str(tmp_path / "photos"), "--output", str(tmp_path / "out"), "--classes", "cat", "--local"]
    words += ["--no-safety", "--faces", "none", "--clip", str(model)]
    with hold(Folder(str(tmp_path / "out")), new_attempt()):
        assert main(["archive", *words]) == 4
    assert "is being written by process" in capsys.readouterr().err
    assert main(["archive", *words]) == 0
    assert "archive written" in capsys.readouterr().out
    assert main(["archive", *words, "--exact"]) == 4
    assert main(["archive", *words[:-2]]) == 4  # the default model is another one


def command(photos, output, model) -> list[str]:
    words = [sys.executable, "-m", "raypipe", "archive", "--input", str(photos), "--output", str(output)]
    words += ["--classes", CATEGORIES, "--no-safety", "--faces", "none", "--clip", str(model), "--n", "50"]
    return [*words, "--batch-size", "8"]


def started(*words: str) -> subprocess.Popen:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


@pytest.mark.slow
def test_drivers_killed_five_times_at_random_leave_the_same_bytes(tmp_path, model, shared):
    photos, rng = tmp_path / "photos", random.Random(0)
    draw(photos, range(3000))
    for folder in ("gloper_examples", "saliency_examples"):
        shutil.copytree(shared / "data" / folder / "images", photos, dirs_exist_ok=True)
    output = tmp_path / "out"
    for _ in range(5):
        job = started(*command(photos, output, model))
        count = len(list(output.glob("_commits/part-*"))) + rng.randint(1, 15)
        wait_until(lambda count=count: len(list(output.glob("_commits/part-*"))) >= count, "part", timeout=600)
        os.kill(job.pid, signal.SIGKILL)
        finish(job)
        assert job.returncode == -signal.SIGKILL
    job = started(*command(photos, output, model))
    assert "archive written" in finish(job, timeout=900), job.returncode
    alone = started(*command(photos, tmp_path / "alone", model))
    finish(alone, timeout=900)
    assert contents(output) == contents(tmp_path / "alone")
    assert len(Run(str(output)).commits()) == 3041
    again = started(*command(photos, output, model))
    assert "all of 3,041 images were embedded before; nothing to do" in finish(again)
    draw(photos, range(3000, 3500))
    more = started(*command(photos, output, model))
    assert "500 of 3,541 images embedded now; archive written" in finish(more, timeout=900)
