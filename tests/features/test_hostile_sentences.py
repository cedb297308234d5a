"""A network for sentences that somebody prepared: its folder runs no code, and cut weights are refused."""

import json

import pytest
from support.tiny._sentences import write_sentences

from raypipe.features.sentences import Sentences


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_the_weights_is_not_run(file, tmp_path):
    folder = write_sentences(tmp_path / "tiny")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    kinds = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel")} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    settings = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    hostile = {"auto_map": kinds, "trust_remote_code": True}
    hostile |= {"model_type": "evil"} if file == "config.json" else {"tokenizer_class": "Evil"}
    (folder / file).write_text(json.dumps(settings | hostile))
    try:
        Sentences(folder, method="naming")
    except ValueError as error:
        assert str(error).startswith("naming: ")
    assert not (tmp_path / "canary").exists()


def test_weights_that_were_cut_are_one_clear_error(tmp_path):
    folder = write_sentences(tmp_path / "tiny")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="^naming: .* cannot be read as a "):
        Sentences(folder, method="naming")
