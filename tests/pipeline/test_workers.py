"""The guard of the stages, in a process of its own, and secrets kept out of a run."""

import threading

import pytest
from support.faulty import GOOD, Faulty, write_images

import raypipe
from raypipe.pipeline import foregrounds, stages
from raypipe.pipeline.job import Label, frozen_settings
from raypipe.pipeline.label import label
from raypipe.types import BadImage


class Lost(Faulty):
    """Raises what torch raises once the GPU's context is lost."""

    def segment(self, images, foregrounds=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", True),
        ("CUDA error: out of memory", False),
        ("shapes do not match", False),
    ],
)
def test_a_lost_gpu_is_told_from_an_ordinary_error(text, lost):
    assert stages.is_device_lost(RuntimeError(text)) == lost
    assert not stages.is_device_lost(MemoryError(text))


def test_a_lost_gpu_makes_no_error_rows(tmp_path):
    write_images(tmp_path / "photos", [GOOD])
    with pytest.raises(RuntimeError, match="CUDA error"):
        label(Label(str(tmp_path / "photos"), str(tmp_path / "run"), local=True), Lost())
    assert not list(tmp_path.glob("run/_commits/*"))


def test_credentials_stand_nowhere_in_a_run(bucket, tmp_path):
    from raypipe import storage

    filesystem, uri = bucket
    storage.put(filesystem, "photos/masks/0000.png", b"")
    secret = uri("masks").replace("s3://", "s3://AKIA:TOPSECRET@")
    write_images(tmp_path / "photos", [GOOD] * 2)
    options = {"foreground": f"given:{secret}", "local": True, "max_bad_fraction": 1.0}
    summary = raypipe.label("kmeans", tmp_path / "photos", tmp_path / "run", **options)
    assert summary.failed == 2
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or b"TOPSECRET" not in file.read_bytes(), file
    assert "TOPSECRET" not in str(foregrounds.parse(f"given:{secret}"))


def test_a_foreground_folder_means_the_same_from_anywhere(tmp_path, monkeypatch):
    from raypipe.segmenters.kmeans import Kmeans

    monkeypatch.chdir(tmp_path)
    frozen = frozen_settings(Kmeans(foreground="given:masks"), None, refine=None, keep_soft=False)
    assert frozen["foreground"] == f"given:{tmp_path}/masks"


def test_a_vanished_part_of_another_run_is_an_error_of_the_image(tmp_path):
    row = {"key": "a.png", "foreground_location": str(tmp_path / "gone.parquet"), "foreground_row": 0}
    with pytest.raises(BadImage, match="foreground.*cannot be read"):
        foregrounds.read(row, foregrounds.parse("run:x"), size=(1, 1), max_bytes=1, max_pixels=1)


def test_a_ledger_counts_starts_and_remembers_what_took_too_long():
    from raypipe.pipeline.workers import Ledger

    ledger = Ledger.__ray_metadata__.modified_class()
    assert ledger.begin("a") == (1, "segment", False)
    ledger.enter("a", "decode")
    ledger.overran("a")
    assert ledger.begin("a") == (2, "decode", True)
    ledger.end("a")
    assert ledger.begin("a") == (1, "segment", False)


def test_time_that_work_waited_for_a_core_of_a_busy_machine_does_not_count():
    from raypipe.pipeline.workers import is_over, waited_for_core

    waits, stretches = iter([5.0, 5.2, 5.3, 5.3]), []
    assert is_over(threading.Event(), 0.1, waited=lambda: next(waits), arm=stretches.append)
    assert stretches == pytest.approx([0.2, 0.1])
    done = threading.Event()
    done.set()
    assert not is_over(done, 60, waited=lambda: 0.0, arm=stretches.append) and len(stretches) == 2
    assert waited_for_core(threading.get_native_id()) >= 0 and waited_for_core(-1) == 0


def test_a_ledger_keeps_what_the_terminal_is_to_be_told():
    from raypipe.pipeline.workers import Ledger

    ledger = Ledger.__ray_metadata__.modified_class()
    ledger.remark("a.png: took longer than 217 s and is tried again; see --timeout")
    counts, remarks = ledger.progress(0)
    assert counts == (0, 0, False) and len(remarks) == 1 and ledger.progress(1)[1] == []
