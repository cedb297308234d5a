"""cluster.yaml against Ray's own schema, and the choice of actors."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


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
