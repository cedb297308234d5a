"""cluster.yaml against Ray's own schema, and the choice of actors."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from support.faulty import GOOD, write_images

import raypipe

ROOT = Path(__file__).resolve().parents[2]


def on_premises(text: str) -> dict:
    """The variant that the file's last comment describes."""
    lines = text[text.index("# On premises") :].splitlines()
    body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines if line.startswith("#"))
    variant = yaml.safe_load(body[body.index("provider:") :])
    config = yaml.safe_load(text)
    for name in ("available_node_types", "head_node_type"):
        del config[name]
    return config | variant


@pytest.mark.parametrize("variant", ["cloud", "on premises"])
def test_the_cluster_file_is_valid(variant):
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (ROOT / "cluster.yaml").read_text()
    config = yaml.safe_load(text) if variant == "cloud" else on_premises(text)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))
    commands = " ".join(config["head_start_ray_commands"])
    assert "RAY_AUTH_MODE=token" in commands and "--dashboard-host=127.0.0.1" in commands
    assert config["provider"]["type"] == ("aws" if variant == "cloud" else "local")


def test_a_local_path_on_a_cluster_of_several_machines_is_remarked():
    code = """
import logging, os, sys
from ray.cluster_utils import Cluster

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
nodes.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = nodes.address
logging.basicConfig(stream=sys.stdout)
from raypipe.runtime import cluster

with cluster.connected(stall=60):
    cluster.warn_of_local_paths(input="photos", output="s3://bucket/run")
nodes.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--input photos is a local path: all machines of the cluster must see it" in done.stdout
    assert "--output" not in done.stdout


def test_relative_paths_mean_the_same_on_a_cluster_whose_workers_are_in_another_folder(tmp_path):
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
    write_images(tmp_path / "mine/photos", [GOOD] * 2)
    code = """
import os, subprocess, sys
from ray.cluster_utils import Cluster

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
words = ["--input", "photos", "--output", "runs/joined", "--foreground", "whole"]
command = [sys.executable, "-m", "raypipe", "label", "kmeans", *words]
done = subprocess.run(command, env=os.environ | {"RAY_ADDRESS": nodes.address}, cwd="../mine")
nodes.shutdown()
sys.exit(done.returncode)
"""
    paths = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "theirs", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(raypipe.load(str(tmp_path / "mine/runs/joined"))) == 2
    assert not list((tmp_path / "theirs").iterdir())
