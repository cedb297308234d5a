"""`raypipe doctor`: without Ray, torch or a network; what it says of weights, packages and GPUs that are put there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raypipe import segmenters
from raypipe.cli.doctor import MISSING, READY, TO_FETCH, Doctor, doctor
from raypipe.networks import _cache_of

DRIVER = """
#include <stdlib.h>
#include <string.h>
int cuDriverGetVersion(int *version) { *version = atoi(getenv("DRIVER_CUDA")); return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int i) { *device = i; return 0; }
int cuDeviceGetName(char *name, int length, int i) { strncpy(name, i ? "Second" : "First", length); return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { *size = 24000000000; return 0; }
"""
WITHOUT = (
    "import sys; sys.modules.update(ray=None); from raypipe.cli import main; code = main();"
    "assert not {'torch', 'cv2', 'scipy', 'transformers'} & set(sys.modules); sys.exit(code)"
)


def diagnose(*words: str, cwd: Path | None = None, **environment: str) -> tuple[int, str]:
    """Exit code and stdout of `raypipe doctor` in a process that has no ray, imports no torch and reaches no host."""
    environment = os.environ | {"HTTPS_PROXY": "http://127.0.0.1:9"} | environment
    command = [sys.executable, "-c", WITHOUT, "doctor", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.fixture
def empty(monkeypatch, tmp_path) -> Path:
    """No weights anywhere, and no variable that forbids to fetch some."""
    from huggingface_hub import constants

    for name, value in {"HF_HOME": tmp_path, "HF_HUB_CACHE": tmp_path / "hub", "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value if isinstance(value, bool) else str(value))
    for name in ("XDG_DATA_HOME", "REMBG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("U2NET_HOME", str(tmp_path / "u2net"))
    return tmp_path


def states() -> dict[str, str]:
    return {row["name"]: row["state"] for row in doctor(Doctor()).methods}


def test_one_screen_without_ray_torch_or_network(tmp_path):
    code, text = diagnose(HF_HOME=str(tmp_path), U2NET_HOME=str(tmp_path))
    assert code == 0 and "Python" in text and "--foreground grabcut" in text
    rows = [line.split()[0] for line in text.splitlines() if " x CPU" in line or " x GPU" in line]
    assert rows == segmenters.names() and len(text.splitlines()) < 50


def test_weights_are_found_where_they_are_kept(empty):
    before = states()
    assert [before[name] for name in ("grabcut", "kmeans", "lost", "sempart")] == [READY, TO_FETCH, TO_FETCH, MISSING]
    snapshot = empty / "hub/models--facebook--dino-vits16/snapshots/1234"
    selfmask = segmenters.find("selfmask").weights
    files = [snapshot / "model.safetensors", empty / "u2net/u2net.onnx", _cache_of(selfmask) / selfmask.split("/")[-1]]
    for file in (*files, snapshot.parents[1] / "refs/main"):
        file.parent.mkdir(parents=True)
        file.write_text("1234")
    after = states()
    assert {after[name] for name in ("lost", "tokencut", "selfmask", "rembg", "kmeans")} == {READY}
    assert after["clipseg"] == TO_FETCH and after["sempart"] == MISSING
    (snapshot / "model.safetensors").unlink()  # of a download that was interrupted
    assert states()["lost"] == TO_FETCH


def test_a_variable_that_forbids_to_fetch_is_named(empty, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = doctor(Doctor())
    assert {row["state"] for row in found.methods} == {READY, MISSING}
    assert "HF_HUB_OFFLINE forbids to fetch weights" in found.text() and found.exit_code == 0


def test_packages_that_are_absent_or_too_old_are_named_with_the_command(tmp_path):
    info = tmp_path / "raypipe-0.1.0.dist-info"
    info.mkdir()
    needs = ("ray[data]>=999", "numpy>=999", "no-such-thing>=1", "pandas>=999; extra == 'test'", "pillow>=1")
    lines = ["Metadata-Version: 2.1", "Name: raypipe", "Version: 0.1.0", *(f"Requires-Dist: {each}" for each in needs)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), os.getcwd()])
    # from there: an installation leaves a raypipe.egg-info in the checkout, which python would find first
    code, text = diagnose("--json", cwd=tmp_path, PYTHONPATH=path)
    found = json.loads(text.splitlines()[-1])
    assert code == 1 and len(found["prevents"]) == 2
    assert "pip install 'numpy>=999'" in found["prevents"][0] and "no-such-thing is not installed" in text
    assert any("pip install 'ray[data]>=999'; until then only" in each for each in found["advice"])


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, for a driver of its own")
@pytest.mark.parametrize(("driver", "fits"), [("11040", False), ("99000", True)])
def test_gpus_are_the_drivers_and_an_old_driver_is_said(tmp_path, driver, fits):
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c"], cwd=tmp_path, check=True)
    code, text = diagnose("--json", LD_LIBRARY_PATH=str(tmp_path), DRIVER_CUDA=driver)
    found = json.loads(text.splitlines()[-1])
    assert code == 0 and [each["name"] for each in found["gpus"]] == ["First", "Second"]
    assert "First with 24 GB, Second with 24 GB" in text
    is_used = fits and found["torch_cuda"] is not None
    sam = next(row for row in found["methods"] if row["name"] == "sam")
    assert (found["device"], sam["device"]) == (("cuda", "cuda") if is_used else ("cpu", "cpu"))
    assert (sam["actors"] == 2) or not is_used
    assert any("stands idle" in each for each in found["advice"]) != is_used
