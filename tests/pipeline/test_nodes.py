"""Ray's own processes and machines that are lost, and a head that jobs are submitted to."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from support.jobs import actors_below, assert_complete, finish, servers_below, wait_for_commits, wait_until

import raypipe


@pytest.mark.slow
def test_a_job_whose_ray_is_killed_says_so_ends_with_1_and_is_resumed(start, photos, tmp_path):
    output = tmp_path / "run"
    job = start(photos, output, sleep=0.3)
    wait_until(lambda: len(servers_below(job.pid)) == 2, "raylet and GCS")
    servers = servers_below(job.pid)
    wait_for_commits(output, 2)
    for server in servers:
        os.kill(server, signal.SIGKILL)
    text = finish(job, timeout=120)
    assert job.returncode == 1, text
    assert "the job stopped: Ray's process on this machine (raylet) has gone" in text and "Traceback" not in text, text
    assert "command goes on" in text, text  # the whole command, unless the main thread waits inside Ray
    job = start(photos, output, sleep=0.3)
    text = finish(job)
    assert job.returncode == 0 and "nothing to do" not in text, text
    assert_complete(output, photos)


@pytest.fixture
def two_nodes(monkeypatch):
    """A cluster of two nodes on this machine that jobs join: it and the node that may be lost."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster, cluster.add_node(num_cpus=2)
    cluster.shutdown()


@pytest.mark.slow
def test_a_node_that_is_lost_while_it_works_loses_and_doubles_nothing(start, photos, tmp_path, two_nodes):
    cluster, node = two_nodes
    (raylet,) = (process.process.pid for process in node.all_processes["raylet"])
    for sleep in (1, 4, 16):  # a busy machine may need longer to start an actor there than the job lasts
        output = tmp_path / f"run{sleep}"
        job = start(photos, output, sleep=sleep)
        wait_until(lambda job=job: job.poll() is not None or actors_below(raylet), "actor on the node")
        wait_for_commits(output, 2)
        if job.poll() is None:
            break
    assert job.poll() is None, finish(job)
    cluster.remove_node(node, allow_graceful=False)
    text = finish(job)
    assert job.returncode in (0, 1), text
    if job.returncode:
        job = start(photos, output, sleep=0.3)
        text = finish(job)
    assert job.returncode == 0, text
    assert_complete(output, photos)


def test_ray_job_submit_runs_the_script_on_a_real_head(photos, tmp_path):
    """A head of its own in a process group of its own, with token authentication, as the README says."""
    ports = [free_port() for _ in range(3)]
    session = tempfile.mkdtemp(prefix="ray")  # not tmp_path: its sockets' names may have 107 characters at most
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    ray = shutil.which("ray", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", f"--port={ports[0]}", f"--dashboard-port={ports[1]}", "--num-cpus=4"]
        + ["--dashboard-host=127.0.0.1", f"--ray-client-server-port={ports[2]}", f"--temp-dir={session}"],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(ports[1])
        output = tmp_path / "run"
        options = ["--input", str(photos), "--output", str(output), "--foreground", "whole", "--json"]
        submit = [
            ray,
            "job",
            "submit",
            "--address",
            f"http://127.0.0.1:{ports[1]}",
            "--working-dir",
            str(Path(__file__).parents[2] / "jobs"),
        ]
        words = [*submit, "--", sys.executable, "label.py", "kmeans", *options]
        run = partial(subprocess.run, words, env=environment, capture_output=True, text=True, timeout=180)
        for _ in range(20):  # the head listens before its agent does
            if "No available agent" not in (job := run()).stderr:
                break
        assert job.returncode == 0, job.stdout + job.stderr
        assert "48 of 48 images labelled" in job.stdout and "succeeded" in job.stdout
        assert raypipe.load(str(output))["error"].to_pylist() == [""] * 48
        record = json.loads(next(output.glob("_runs/2*.json")).read_text())
        assert record["exit_code"] == 0 and record["labelled"] == 48
        words[words.index(str(output))] = "run"  # would lie in Ray's throw-away folder
        job = run()
        assert job.returncode == 1 and "--output" in job.stdout and "give an absolute path or a URI" in job.stdout
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(session, ignore_errors=True)


def free_port() -> int:
    """A free port below the range that Ray gives its workers (10002 to 19999)."""
    while True:
        port = random.randint(5000, 9999)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def wait_for_port(port: int) -> None:
    def listens() -> bool:
        with socket.socket() as probe:
            return not probe.connect_ex(("127.0.0.1", port))

    wait_until(listens, f"listener on port {port}")
