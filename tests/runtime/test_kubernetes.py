"""jobs/rayjob.yaml, nightly.yaml and Dockerfile: valid, at one with each other and the rest of the checkout."""

import copy
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from raypipe.cli.verbs import main

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = yaml.safe_load((ROOT / "tests/support/rayjob_schema.yaml").read_text())
JOB = yaml.safe_load((ROOT / "jobs/rayjob.yaml").read_text())
DOCKERFILE = (ROOT / "jobs/Dockerfile").read_text()


def valid(job: dict) -> bool:
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(job)


def steps() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with what they are given."""
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def test_the_job_is_a_rayjob_as_kuberay_takes_it():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(JOB, SCHEMA)
    groups = JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),  # Ray's parameters are texts
        ("spec.rayClusterSpec.rayVersion", None),  # which authOptions ask for
        ("spec.rayClusterSpec.workerGroupSpecs.0.groupName", None),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.memory", "64 GB"),
        ("spec.shutdownAfterJobFinishes", False),  # what ttlSecondsAfterFinished needs
        ("spec.entryPoint", "raypipe"),  # no such name
    ],
)
def test_the_schema_refuses_what_kuberay_refuses_or_drops(path, value):
    spoilt = copy.deepcopy(JOB)
    *names, last = (int(name) if name.isdigit() else name for name in path.split("."))
    place = spoilt
    for name in names:
        place = place[name]
    place[last] = value
    if value is None:
        del place[last]
    assert valid(JOB) and not valid(spoilt)


def test_the_job_runs_a_command_that_raypipe_understands(capsys):
    program, *words = shlex.split(JOB["spec"]["entrypoint"])
    assert program == "raypipe" and main([*words, "--print-config"]) == 0
    assert "input: s3://bucket/photos" in capsys.readouterr().out


def test_no_pod_is_root_or_open_to_whoever_reaches_it():
    cluster = JOB["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert all(not each["securityContext"]["allowPrivilegeEscalation"] for each in pod["containers"])
    users = [given for step, given in steps() if step == "USER"]
    assert users == ["1000:100"]


def test_one_version_of_ray_everywhere():
    version = re.search(r"ARG RAY=(\S+)", DOCKERFILE)[1]
    assert JOB["spec"]["rayClusterSpec"]["rayVersion"] == version
    python = re.search(r"ARG PYTHON=(\S+)", DOCKERFILE)[1]
    image = yaml.safe_load((ROOT / "cluster.yaml").read_text())["docker"]["image"]
    assert image.startswith(f"rayproject/ray:{version}-{python}")


def test_the_nightly_job_creates_that_file_and_may_do_nothing_else():
    cron, account, role, binding = yaml.safe_load_all((ROOT / "jobs/nightly.yaml").read_text())
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    mount = pod["containers"][0]["volumeMounts"][0]
    assert pod["containers"][0]["args"] == ["create", "-f", f"{mount['mountPath']}/rayjob.yaml"]
    assert pod["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_the_images_have_two_targets_and_only_the_package_goes_in():
    targets = [given.split(" AS ")[1] for step, given in steps() if step == "FROM"]
    assert targets == ["needs", "cpu", "cuda"]
    admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert admitted == ["pyproject.toml", "README.md", "LICENSE", "raypipe"]
    for target in ("cpu", "cuda"):  # raypipe's needs before its code, so that new code leaves that layer as it is
        part = DOCKERFILE.partition(f" AS {target}\n")[2].partition("\nFROM ")[0]
        assert part.index("'./source[cluster]'") < part.index("COPY") < part.index("--no-deps")
    assert "ADD " not in DOCKERFILE and not re.search("(?i)password|token|secret_|aws_", DOCKERFILE)
