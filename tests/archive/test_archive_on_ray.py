"""The verb on Ray: the same archive as in a plain loop, whichever graph embeds, with faces looked for by workers."""

import logging
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import red_faces
from support.corpora import OnFakeGpu, contents, draw, wanted
from support.tiny import _clip

from raypipe.archive import embedding, tools
from raypipe.archive.archive import archive
from raypipe.archive.embedding import Embedding
from raypipe.inputs.manifest import list_inputs
from raypipe.pipeline import stages
from raypipe.pipeline.label import attempt
from raypipe.pipeline.workers import from_columns, to_columns
from raypipe.run import Run, rows
from raypipe.runtime import cluster


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    """One local Ray for all tests of the file."""
    import ray

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(address="local", num_cpus=4, num_gpus=1, **options)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _clip.write_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def photos(tmp_path):
    """Blobs, a broken file, and pictures whose red patch a made-up detector takes for a face."""
    draw(tmp_path / "photos", range(16), brightest=120)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    draw(tmp_path / "photos", range(100, 104), size=(128, 128), brightest=120)
    for path in (tmp_path / "photos").glob("01*"):
        pixels = np.asarray(Image.open(path)).copy()
        pixels[32:64, 32:64] = (255, 0, 0)
        Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize("few", [tools.FEW, pytest.param(1, marks=pytest.mark.slow)])
def test_workers_make_the_archive_of_a_plain_loop_and_faces_are_dropped_without_refill(
    photos, tmp_path, model, monkeypatch, few
):
    monkeypatch.setattr(tools, "FEW", few)  # above which workers rank too
    faces = str(red_faces.centerface(tmp_path / "faces.onnx"))
    options = {"n": 20, "faces": faces, "classes": "cat,dog", "concepts": "default", "safety": True, "device": "cpu"}
    made = archive(wanted(photos, tmp_path / "ray", model, actors=2, **options))
    assert (made.embedded, made.failed, made.is_new) == (21, 1, True)
    archive(wanted(photos, tmp_path / "local", model, local=True, **options))
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    rejects = pq.read_table(tmp_path / "ray" / "rejects.parquet").to_pylist()
    members = pq.read_table(tmp_path / "ray" / "archive.parquet").to_pylist()
    reasons = {reason: {row["key"] for row in rejects if row["reason"] == reason} for reason in ("face", "unsafe")}
    assert reasons["unsafe"] and reasons["face"] == {f"010{i}.png" for i in range(4)} - reasons["unsafe"] != set()
    for category in ("cat", "dog"):
        its = [row for row in members if row["category"] == category]
        assert [row["rank"] for row in its] == list(range(len(its)))
        assert its and max(row["key"] for row in its) < "0100.png"
    assert not archive(wanted(photos, tmp_path / "ray", model, actors=2, **options)).is_new


@pytest.mark.slow
def test_squares_instead_of_photographs_cross_to_a_gpu_with_the_same_rows(photos, tmp_path, model):
    job = wanted(photos, tmp_path / "gpu", model, device="cuda")
    method = OnFakeGpu(clip=str(model))
    options = {"refiner": None, "foreground": None, "keep_soft": False}
    limits = {"max_pixels": job.max_pixels, "max_bytes": job.max_bytes}
    work = Embedding(segmenter=method, batch_size=4, timeout=60.0, **options, **limits)
    run, images = Run(job.output, embedding.METHOD, work.table), list_inputs(job.input)
    attempt(job, work, run, images, settings=embedding.settings(method))
    archive(wanted(photos, tmp_path / "local", model, local=True))
    one, other = (rows.load(each).sort_by("key") for each in (run, Run(str(tmp_path / "local"))))
    assert one.drop_columns(["seconds", "attempt"]).equals(other.drop_columns(["seconds", "attempt"]))


def test_what_a_worker_warns_of_is_told_here(caplog, local_ray):
    import ray

    def doubled(number):
        logging.getLogger("raypipe").warning("%d is %s", number, "odd")
        return 2 * number

    assert cluster.told(ray.remote(num_cpus=1)(cluster.overheard).remote(doubled, 3)) == 6
    assert caplog.messages == ["3 is odd"]


def test_what_crosses_is_the_square_alone(photos, model):
    work = Embedding(
        segmenter=OnFakeGpu(clip=str(model)), refiner=None, foreground=None, batch_size=4, timeout=60.0,
        keep_soft=False, max_pixels=10**8, max_bytes=10**8,
    )  # fmt: skip
    segment = stages.Segment(work)
    listed = list_inputs(str(photos)).to_pylist()
    decoded = list(stages.decode(listed, replace(work, **work.learned())))
    assert {row["image"].shape for row in decoded if not row["error"]} == {(64, 64, 3)}
    crossed = [row for each in decoded for row in from_columns(to_columns(each))]
    found = stages.table(stages.encode(segment(crossed), work), work)
    assert found["embedding"].null_count == 1 and found["height"].to_pylist()[0] == 40
