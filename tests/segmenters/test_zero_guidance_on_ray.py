"""Zero-guidance segmentation on a real Ray: killed while it searches for names, and gone on with."""

import os
import signal
import subprocess
import sys

from PIL import Image
from skimage import data
from support import tiny
from support.jobs import wait_for_commits
from support.written import rows_of

import raypipe
from raypipe.pipeline.job import Label
from raypipe.pipeline.label import label
from raypipe.segmenters.zero_guidance import ZeroGuidance

IMAGES = 8
SEARCH = {"naming": "zerocap", "beam_size": 2, "max_new_tokens": 2, "steps": 1}


def test_killed_while_two_workers_search_for_names_only_open_blocks_are_done_again(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(IMAGES):
        Image.fromarray(data.astronaut()[40 * i : 40 * i + 80, 100:200:2]).save(tmp_path / f"photos/{i}.png")
    options = tiny.options("zero_guidance", tmp_path / "weights") | {"size": 32, "num_parts": 3, "tau_merge": 0.5}
    options |= SEARCH
    job = {"input": str(tmp_path / "photos"), "output": str(tmp_path / "run"), "batch_size": 1}
    words = [[f"--{name.replace('_', '-')}", str(value)] for name, value in (job | {"actors": 2} | options).items()]
    command = [sys.executable, "-m", "raypipe", "label", "zero_guidance", "--keep-embeddings", *sum(words, [])]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for_commits(tmp_path / "run", 1)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    committed = len(rows_of(tmp_path / "run"))
    assert 0 < committed < IMAGES
    for output in ("run", "alone"):
        more = {"output": str(tmp_path / output), "local": True, "keep_embeddings": True}
        summary = label(Label(**job | more), ZeroGuidance(**options))
        assert (summary.labelled, summary.failed) == (IMAGES - committed * (output == "run"), 0)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "alone")
    both = [raypipe.load(str(tmp_path / output), ["key", "segments"], embeddings=True) for output in ("run", "alone")]
    one, other = (sorted(table.to_pylist(), key=lambda row: row["key"]) for table in both)
    assert one == other and len(one) == IMAGES and all(each["embedding"] for row in one for each in row["segments"])
