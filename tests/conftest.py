"""Fixtures that several test files need, and how the suite stays quick.

Without `slow` it takes half an hour on two cores, of which Ray and what dies in it take 17 minutes. All of CI has 40
minutes, the lowest versions' seven among them:

- One Ray per file: tests in a file that needs it share a module's fixture. Only tests that kill or interrupt a driver
  start their own (`support/drive.py`), each for several claims at once. They wait for files, never for a clock.
- One contract for all methods, refiners and tasks (`test_segmenters.py`, `test_refiners.py`, `test_rooms.py`), found by
  name, on weights made once per session: `support/tiny/<method>.py`, a few thousand parameters, images of 64 px. A
  method's own file tests what is its own: its golden arrays, its degenerate cases. Budget: 40 s per method on one core.
- Networks run on one thread (`one_thread`), which on tiny ones is faster than two.
- What shows again what a smaller case has shown carries the marker `slow`: ten minutes, which CI takes only if it has
  them.
- The folders that need no Ray cluster run in two processes (pytest-xdist, `-n 2 --dist loadfile`). The others do not:
  two Rays side by side on two cores make the tests of faults wait for each other.
"""

import os
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

# Child processes, Ray's workers among them, import `support` too.
TESTS = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of stored reference arrays and photographs that are not part of the repository; skips without it."""
    folder = Path(os.environ.get("RAYPIPE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference data in {folder}; set RAYPIPE_SHARED to its folder")
    return folder


@pytest.fixture
def one_thread():
    """Torch on one thread: more gain nothing on tiny networks, and on a busy machine wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3_server():
    """The address of a real S3 API on loopback. Nothing leaves this machine."""
    pytest.importorskip("moto.server", reason="needs moto[server]")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """An empty bucket: its pyarrow file system, and a function from a key to its URI."""
    from pyarrow import fs as pafs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    urlopen(Request(f"{s3_server}/moto-api/reset", method="POST"), timeout=10).close()
    options = f"endpoint_override={s3_server}&region=us-east-1&scheme=http"
    filesystem, _ = pafs.FileSystem.from_uri(f"s3://photos?{options}&allow_bucket_creation=true")
    filesystem.create_dir("photos")
    return filesystem, lambda key="": f"s3://photos/{key}?{options}"
