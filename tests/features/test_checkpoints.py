"""The published network that weights are is told by their names."""

import json
import logging

import pytest

from raypipe.features.checkpoints import S8, S8_300, check_checkpoint


def check(weights, needed=S8_300):
    check_checkpoint(str(weights), needed=needed, method="found")


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_the_network_that_is_needed_is_known_by_all_its_names(tmp_path, caplog):
    file = put(tmp_path / "dino_deitsmall8_300ep_pretrain.pth")
    for weights in (S8_300, file, file.parent):
        check(weights)
    for weights in (S8, f"{S8}@main", put(tmp_path / "hub/dino_deitsmall8_pretrain.pth")):
        check(weights, needed=S8)
    folder = put(tmp_path / "fetched/model.safetensors").parent
    (folder / "source.json").write_text(json.dumps({"weights": f"{S8}@0123", "revision": "0123"}))
    check(folder, needed=S8)
    assert not caplog.records


def test_the_other_vit_s8_is_refused_with_what_to_pass(tmp_path):
    folder = put(tmp_path / "fetched/model.safetensors").parent
    (folder / "source.json").write_text(json.dumps({"weights": S8}))
    for weights in (S8, put(tmp_path / "dino_deitsmall8_pretrain.pth"), folder):
        with pytest.raises(ValueError, match="^found: backbone '.*' is facebook/dino-vits8, but dino_deitsmall8_300ep"):
            check(weights)
    with pytest.raises(ValueError, match=f"is needed: pass --backbone {S8_300}, or that file"):
        check(S8)
    with pytest.raises(ValueError, match="is dino_deitsmall8_300ep_pretrain.pth, but facebook/dino-vits8 is needed"):
        check(S8_300, needed=S8)
    with pytest.raises(ValueError, match="'facebook/dino-vits16' is facebook/dino-vits16, but"):
        check("facebook/dino-vits16")


def test_an_unknown_checkpoint_is_one_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "raypipe"):
        for _ in range(3):
            check(put(tmp_path / "mine.pth"))
    (record,) = caplog.records
    assert "found: backbone" in record.message and "mine.pth' has no name that is known here" in record.message
    assert "dino_deitsmall8_300ep_pretrain.pth under another name" in record.message
