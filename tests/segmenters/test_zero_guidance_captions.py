"""ZeroCap's search: against stored arrays and the search as it is written, and what must not change its texts."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.golden import arrays
from support.tiny import dino
from support.tiny._clip import write_model
from support.tiny.zero_guidance import write_lm

from raypipe.benchmark.plain.naming import PlainZeroCap
from raypipe.features.clip import Clip
from raypipe.segmenters.zero_guidance import captions
from raypipe.segmenters.zero_guidance.captions import Step, ZeroCap, _Beams, forbidden_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
OF = {"method": "zero_guidance", "device": "cpu"}
QUICK = {"beam_size": 3, "max_new_tokens": 3, "steps": 2, "step_size": 3.0}  # far enough for texts to differ


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return write_lm(folder / "lm"), write_model(folder / "clip")


@pytest.fixture(scope="module")
def clip(folders):
    return Clip(folders[1], **OF, vision=False)


@pytest.fixture(scope="module")
def search(folders, clip):
    return ZeroCap(folders[0], clip, **OF, **QUICK)


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(size=(6, 24)).astype(np.float32)


@pytest.fixture(params=["zerocap_beam2", "zerocap_beam3"])
def golden(request, shared):
    """A stored case, and our search with its options."""
    models, case = shared / "golden" / "models", arrays(shared / "golden" / "clip_captioning" / f"{request.param}.npz")
    names = {
        "beam_size": "beam_size", "max_new_tokens": "target_seq_length", "steps": "num_iterations",
        "clip_temperature": "clip_loss_temperature",
    }  # fmt: skip
    options = {name: case[stored].item() for name, stored in names.items()}
    clip = models / "clip-l14-like-tiny"
    network = Clip(clip, **OF, vision=False)
    return case, ZeroCap(models / "gpt2-tiny", network, **OF, **options, forbidden=case["forbidden_tokens"]), clip


def test_the_search_ends_as_the_reference_s_of_a_twentieth_of_the_tokens(golden):
    case, search, clip = golden
    assert search.begin == case["prompt_ids"].tolist() and search.end == case["end_token"]
    feature = case["image_feature"]
    (texts,) = search(feature[None] * 3)
    assert texts == case["texts"].tolist()
    plain = PlainZeroCap(search, clip)
    if len(texts) == 2:  # the other takes the plain search ten seconds
        assert plain(feature) == texts
        assert 20 * search.encoded < plain.encoded
    contexts = [len(case[f"step{i}_context_ids"]) for i in range(case["n_steps"])]
    assert 20 * search.encoded < sum(contexts) * search.steps * 512 * 77


def test_every_step_is_the_reference_s(golden):
    case, search, _ = golden
    unit, begin = torch.tensor(case["image_feature"]), len(case["prompt_ids"])
    for i in range(case["n_steps"]):
        at, atol = f"step{i}_", 1e-4 if i == 0 else 1e-3
        texts = torch.tensor(case[f"{at}context_ids"])[:, begin:]
        step = Step(search, unit.expand(len(texts), -1), texts)
        for k in range(search.steps):
            log_p, loss, distance, gradient = step.descend()
            np.testing.assert_allclose(loss, case[f"{at}clip_loss"][k], rtol=1e-3)
            np.testing.assert_allclose(distance, case[f"{at}kl"][k], rtol=1e-3, atol=1e-6)
            if f"{at}shifted_probs" in case:
                np.testing.assert_allclose(log_p.exp(), case[f"{at}shifted_probs"][k], atol=atol)
            if i == k == 0:
                stored = case["step0_iter0_grad"]
                np.testing.assert_allclose(gradient.reshape(stored.shape), stored, atol=1e-4)
        if f"{at}delta" in case:
            np.testing.assert_allclose(step.shift.reshape(case[f"{at}delta"].shape), case[f"{at}delta"], atol=atol)
        np.testing.assert_allclose(step.start.exp(), case[f"{at}probs_before"], atol=atol)
        fused = case[f"{at}probs_fused"]  # over all beams together; ours over each
        np.testing.assert_allclose(step.log_p().exp(), fused / fused.sum(1, keepdims=True), atol=atol)


def test_it_finds_the_texts_of_the_search_as_it_is_written(folders, search, rows):
    before, plain = search.encoded, PlainZeroCap(search, folders[1])
    assert search(rows[:1]) == plain.each(rows[:1])
    assert 20 * (search.encoded - before) < plain.encoded


def test_texts_do_not_depend_on_what_is_beside_them(folders, clip, search, rows, monkeypatch):
    expected = search(rows)
    assert len({text for texts in expected for text in texts}) > len(rows)
    assert search(rows[::-1])[::-1] == expected
    monkeypatch.setitem(captions.ROWS, "cpu", 7)  # rows of several segments, filled up, as on a GPU
    fresh = ZeroCap(folders[0], clip, **OF, **QUICK)
    assert fresh(rows) == expected
    assert [fresh(row[None])[0] for row in rows] == expected


def test_where_memory_lacks_fewer_are_read_at_once_with_the_same_texts(folders, clip, search, rows, monkeypatch):
    sizes = []

    def lack(_module, given):
        sizes.append(len(given[0]))
        if len(given[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    small = ZeroCap(folders[0], clip, **OF, **QUICK)
    small.network.transformer.register_forward_pre_hook(lambda module, given, _: lack(module, given), with_kwargs=True)
    monkeypatch.setitem(captions.ROWS, "cpu", 7)
    assert small(rows) == search(rows) and {*sizes} == {7, 4, 3, 2, 1}
    small.network.transformer.wte.register_forward_pre_hook(lambda *_: lack(None, [[0] * 3]))
    with pytest.raises(torch.OutOfMemoryError):
        small(rows[:1])


def test_without_a_segment_no_network_is_asked(folders, clip):
    idle = ZeroCap(folders[0], clip, **OF)
    idle.network = None
    assert idle(np.empty((0, 24), np.float32)) == [] and idle.encoded == 0


def test_a_text_ends_with_its_stop_and_waits_for_the_others():
    log_p, tokens = torch.tensor([[-0.1, -0.5, -3.0]]), torch.tensor([[7, 9, 4]])  # 9 is the stop
    beams = _Beams.empty().grown(log_p, tokens, 9)
    assert beams.tokens.tolist() == [[7], [9], [4]] and beams.is_ended.tolist() == [False, True, False]
    two = torch.tensor([[-0.2, -0.3, -0.4], [-0.1, -9.0, -9.0]]), torch.tensor([[5, 6, 9], [5, 6, 7]])
    beams = beams.grown(*two, 9)
    assert beams.tokens.tolist() == [[7, 5], [7, 6], [7, 9]]  # on average -0.15, -0.2, -0.25; the stop alone: -0.5
    torch.testing.assert_close(beams.scores, torch.tensor([-0.3, -0.4, -0.5]))
    beams = beams.grown(torch.tensor([[-1.4, -2.0, -3.0]] * 2), torch.tensor([[1, 2, 3]] * 2), 9)
    assert beams.tokens.tolist() == [[7, 9, 0], [7, 5, 1], [7, 6, 1]] and beams.lengths.tolist() == [2, 3, 3]
    assert beams.best_first() == [[7, 9], [7, 5, 1], [7, 6, 1]]


def test_a_segment_whose_texts_have_all_ended_is_done(folders, clip, rows):
    alone = ZeroCap(folders[0], clip, **OF, **QUICK | {"beam_size": 1}, start_factor=1.0)
    ((text,), (other,)) = alone(rows[:2])
    assert text[0] not in other
    alone.end = alone.texts.index(text[0])  # what it writes first, as if that were the stop
    assert alone(rows[:2]) == [[text[0]], [other]]


def test_tokens_that_no_name_has_are_forbidden():
    allowed = [" cat", "cat", "Cat", ".", "'s", " été", "É"]
    others = ["\ufffd", " Cat", " É", " 2", "b2", ",", " a-b", "\n", " ", "", "<|endoftext|>"]
    assert forbidden_tokens([*allowed, *others]) == [*range(len(allowed), len(allowed) + len(others))]
    assert forbidden_tokens([*allowed, *others], "none") == []
    assert forbidden_tokens([*allowed, *others], r"(?i)cat|\d") == [0, 1, 2, 8, 10, 11]


def test_what_is_forbidden_is_not_written_where_else_it_would_be(folders, clip, search, rows):
    written = "".join(text for (text, *_) in search(rows))
    letter = max("abcdefghijklmnopqrstuvwxyz", key=written.count)
    other = ZeroCap(folders[0], clip, **OF, **QUICK, forbidden=letter, forbidden_factor=1e6)
    assert [search.texts[i] for i in other.is_forbidden.nonzero()] == [text for text in search.texts if letter in text]
    assert letter in written and not any(letter in text for (text, *_) in other(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"clip_temperature": 0.0}, "clip_temperature must be above 0, got 0.0"),
        ({"ce_scale": float("nan")}, "ce_scale must be 0 or more, got nan"),
        ({"fusion": 1.5}, "fusion must be at most 1, got 1.5"),
        ({"forbidden": "["}, "forbidden must be default, none or a regular expression, got '\\['"),
        ({"forbidden": ""}, "forbidden '' leaves no token of .*; forbid fewer"),
        ({"max_new_tokens": 60}, "with max_new_tokens 60 a text has more than the 64 tokens of .*; choose fewer"),
    ],
)
def test_options_without_sense_are_refused(options, message, folders, clip):
    with pytest.raises(ValueError, match=f"zero_guidance: {message}"):
        ZeroCap(folders[0], clip, **OF, **options)


@pytest.mark.parametrize("fault", ["a word more", "a word less", "no merges", "no tokenizer", "no stop"])
def test_a_tokenizer_of_another_vocabulary_is_refused(fault, folders, clip, tmp_path):
    folder = shutil.copytree(folders[0], tmp_path / "lm")
    words = json.loads((folder / "vocab.json").read_text())
    if fault == "a word more":
        words["Ġcats"] = len(words)
    elif fault == "a word less":
        words = {word: number for word, number in words.items() if number != 256}
    elif fault == "no stop":
        words = {"," * 9 if word == "." else word: number for word, number in words.items()}
    (folder / "vocab.json").write_text(json.dumps(words))
    for file in {"no merges": ["merges.txt"], "no tokenizer": ["merges.txt", "vocab.json"]}.get(fault, ()):
        (folder / file).unlink()
    with pytest.raises(ValueError, match="zero_guidance: .*lm holds no tokenizer of its GPT-2 .*; expected its vocab"):
        ZeroCap(folder, clip, **OF)


def test_other_networks_and_damaged_ones_are_refused(folders, clip, rows, tmp_path):
    with pytest.raises(ValueError, match="zero_guidance: .* (cannot be read as|holds no) a? ?GPT2LMHeadModel"):
        ZeroCap(dino.write_model(tmp_path / "dino"), clip, **OF)
    folder = shutil.copytree(folders[0], tmp_path / "lm")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="zero_guidance: .*lm gives no finite numbers; use other weights"):
        ZeroCap(folder, clip, **OF, **QUICK)(rows[:1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_writes_what_the_cpu_writes(folders, search, rows):
    network = Clip(folders[1], method="zero_guidance", device="cuda", vision=False)
    options = {"method": "zero_guidance", "device": "cuda", **QUICK}
    exact = ZeroCap(folders[0], network, **options, dtype="float32")
    assert exact(rows) == search(rows)
    reduced = ZeroCap(folders[0], network, **options)
    assert reduced(rows) == [reduced(row[None])[0] for row in rows]
    assert np.mean([one[0] == two[0] for one, two in zip(reduced(rows), search(rows), strict=True)]) > 0.5
