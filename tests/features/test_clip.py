"""CLIP's texts, images and dense features: against stored arrays, a plain formulation, and what is refused."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from support.golden import arrays
from support.tiny._clip import write_model

from raypipe.features import clip, clip_vit
from raypipe.features.clip import Clip, normalise, prepare, read_templates, settle_templates


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tiny(weights) -> Clip:
    return Clip(weights, method="maskclip", device="cpu")


@pytest.fixture
def golden(shared):
    """Arrays of a case, and the CLIP that made them."""
    weights = shared / "golden" / "models" / "clip-tiny"

    def case(name: str, **options) -> tuple[dict, Clip]:
        return arrays(shared / "golden" / f"{name}.npz"), Clip(weights, method="test", device="cpu", **options)

    return case


@pytest.fixture
def published(shared) -> str:
    """The reference's 85 templates, as a file."""
    return str(shared / "data" / "prompt_templates.txt")


def test_texts_are_tokenised_and_averaged_as_the_reference_does(golden, published):
    case, network = golden("clip_archive/text_ensemble")
    queries = [str(each) for each in case["categories"]]
    for i, query in enumerate(queries):
        texts = [pattern.replace("{}", query) for pattern in read_templates(published)]
        for found, expected in zip(network.tokens(texts), case["token_ids"][i], strict=True):
            assert found == expected[: len(found)].tolist() and not expected[len(found) :].any()
        np.testing.assert_allclose(network.text_features(texts), case["text_features"][i], atol=1e-5)
    np.testing.assert_allclose(network.texts(queries, published), case["ensemble"], atol=1e-5)
    np.testing.assert_allclose(network.texts(queries, "none"), case["single"], atol=1e-5)
    assert np.abs(network.texts(queries) - case["ensemble"]).max() > 1e-3  # ours ask in other words


@pytest.mark.parametrize("photo", ["astronaut", "chelsea", "coffee"])
def test_images_are_prepared_and_embedded_as_the_reference_does(golden, photo):
    case, network = golden("clip_archive/image_embed")
    square = network.prepared(case[f"image_{photo}"])
    pixels = normalise(torch.tensor(square).permute(2, 0, 1)[None])[0]
    np.testing.assert_allclose(pixels, case[f"pixels_{photo}"], atol=1e-6)
    np.testing.assert_allclose(network.embed([case[f"image_{photo}"]])[0], case[f"embed_{photo}"], atol=1e-5)


@pytest.mark.parametrize("name", ["dense_square", "dense_rect", "dense_literal_ref"])
def test_dense_features_are_the_reference_s(golden, name):
    is_literal = name == "dense_literal_ref"
    case, network = golden(f"maskclip/{name}", text=False, literal=is_literal)
    statistics = "imagenet" if is_literal else "clip"
    pixels = normalise(torch.tensor(case["image"]).permute(2, 0, 1)[None], statistics)
    np.testing.assert_allclose(pixels[0], case["pixels"], atol=1e-6)
    below, right = (-side % network.patch for side in pixels.shape[2:])
    padded = torch.nn.functional.pad(pixels, (0, right, 0, below))
    features, keys = network.dense(padded, keys=True)
    np.testing.assert_allclose(network._network.values(padded)[0][0], case["value_tokens"], atol=2e-4)
    np.testing.assert_allclose(features[0], case["dense_features"], atol=2e-4)
    np.testing.assert_allclose(keys[0].flatten(1).T, case["key_tokens"], atol=2e-4)
    for residual, key in (("full", "cosine"), ("plain", "cosine_plain")):
        if key in case:
            unit = torch.nn.functional.normalize(network.dense(padded, residual=residual), dim=1)
            cosine = torch.einsum("cd,dhw->chw", torch.tensor(case["text_embeddings"]), unit[0])
            np.testing.assert_allclose(cosine, case[key], atol=2e-5)


def test_the_complete_vocabulary_gives_clips_own_tokens(shared):
    folder = shared / "golden" / "models" / "clip-tokenizer"
    found = clip_vit.tokenizer(folder, 49408, method="test")
    # numbers as OpenAI's own tokenizer gives them
    expected = {"a diagram": [320, 22697], "a photo of a cat.": [320, 1125, 539, 320, 2368, 269]}
    for text, ids in expected.items():
        assert found(text)["input_ids"] == [49406, *ids, 49407]
    assert found("  A   Photo of a CAT. ")["input_ids"] == found("a photo of a cat.")["input_ids"]


def test_the_package_has_85_templates_of_its_own(shared):
    ours = read_templates("default")
    theirs = (shared / "data" / "prompt_templates.txt").read_text().splitlines()
    assert len(ours) == len(set(ours)) == len(theirs) == 85 and not set(ours) & set(theirs)


def test_an_ensemble_is_the_normalised_mean_of_normalised_answers(weights, tiny, tmp_path):
    from transformers import CLIPModel, CLIPTokenizer

    (tmp_path / "t.txt").write_text("a drawing of a {}.\n\nthe {} and another {}\n")
    network, words = CLIPModel.from_pretrained(weights).eval(), CLIPTokenizer.from_pretrained(weights)
    for query in ("cat", "tv/monitor", "{}", "Hängebrücke"):
        rows = []
        for text in (f"a drawing of a {query}.", f"the {query} and another {query}"):
            with torch.inference_mode():
                row = network.get_text_features(**words(text, return_tensors="pt")).pooler_output[0].numpy()
            rows.append(row / np.linalg.norm(row))
        mean = np.mean(rows, axis=0)
        (found,) = tiny.texts([query], str(tmp_path / "t.txt"))
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-6)


def test_a_text_is_asked_once_in_a_process_and_alone(weights):
    one, other = (Clip(weights, method="test", device="cpu", vision=False) for _ in range(2))
    both = one.texts(["some cat", "some much longer text about a dog"])
    torch.nn.init.zeros_(other._network._network.text_model.final_layer_norm.weight)
    torch.nn.init.zeros_(other._network._network.text_model.final_layer_norm.bias)
    assert other._network.digest_of_texts != one._network.digest_of_texts  # another network: asked anew
    assert not np.array_equal(other.texts(["some cat"]), both[:1])
    torch.nn.init.zeros_(one._network._network.text_projection.weight)  # would give nothing, if it were asked again
    np.testing.assert_array_equal(one.texts(["some cat"]), both[:1])
    again = Clip(weights, method="test", device="cpu")
    clip._TEXTS.clear()
    np.testing.assert_array_equal(again.texts(["some cat"]), both[:1])  # whatever was asked beside it


def test_embeddings_are_those_of_transformers(weights, tiny):
    from transformers import CLIPModel

    network = CLIPModel.from_pretrained(weights).eval()
    images = [data.chelsea(), data.astronaut()[:40], data.coffee()[:, :33]]
    found = tiny.embed(images)
    for image, row in zip(images, found, strict=True):
        with torch.inference_mode():
            pixels = normalise(torch.tensor(tiny.prepared(image)).permute(2, 0, 1)[None])
            expected = network.get_image_features(pixel_values=pixels).pooler_output[0]
        np.testing.assert_allclose(row, expected / expected.norm(), atol=1e-5)
        np.testing.assert_array_equal(row, tiny.embed([image])[0])  # whatever is beside it
    assert tiny.embed([]).shape == (0, 24)


@pytest.mark.parametrize("size", [(64, 64), (75, 113), (300, 65), (20, 31), (1, 1), (1, 7), (60, 3)])
def test_the_square_is_cut_out_of_the_whole_resized_image(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    short = min(size)
    height, width = (64 if side == short else int(64 * side / short) for side in size)
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - 64) / 2), round((width - 64) / 2)
    np.testing.assert_array_equal(prepare(image, 64), whole[top : top + 64, left : left + 64])


def test_a_strip_is_prepared_without_its_ends():
    strip = np.zeros((1, 60_000, 3), np.uint8)  # whole it would be 336 x 20 million px
    strip[:, 29_990:30_010] = 200
    assert prepare(strip, 336).shape == (336, 336, 3) and prepare(strip, 336)[:, 160:176].min() > 150


def test_dense_features_are_the_last_layer_without_its_attention(weights, tiny):
    from transformers import CLIPModel

    network = CLIPModel.from_pretrained(weights).eval()
    vision, pixels = network.vision_model, torch.randn(2, 3, 32, 128, generator=torch.Generator().manual_seed(0))
    for residual in ("full", "plain"):
        with torch.inference_mode():
            tokens = vision(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2]
            last = vision.encoder.layers[-1]
            values = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(tokens)))
            if residual == "full":
                values = values + tokens
                values = values + last.mlp(last.layer_norm2(values))
            expected = network.visual_projection(vision.post_layernorm(values))[:, 1:]
        found = tiny.dense(pixels, residual=residual)
        assert found.shape == (2, 24, 2, 8)
        torch.testing.assert_close(found.flatten(2).movedim(1, 2), expected, rtol=0, atol=1e-5)


def test_networks_of_other_sizes_are_read(tmp_path):
    other = Clip(write_model(tmp_path, size=84, patch=14), method="test", device="cpu", text=False)
    assert (other.size, other.patch, other.width) == (84, 14, 24)
    pixels = torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    wide = other.dense(torch.cat([pixels, pixels], 3))
    assert other.dense(pixels).shape == (1, 24, 6, 6) and wide.shape == (1, 24, 6, 12) and wide.isfinite().all()
    assert other.embed([data.chelsea()]).shape == (1, 24)


def test_positions_are_resampled_where_only_the_shape_differs(tiny):
    stored = tiny._network._network.vision_model.embeddings.position_embedding.weight
    assert torch.equal(tiny._network._positions(4, 4), stored)
    other = tiny._network._positions(2, 8)  # as many cells
    assert other.shape == stored.shape and torch.equal(other[0], stored[0])
    assert (other[1:] - stored[1:]).abs().max() > 0.1


def test_bfloat16_stays_near_float32_and_what_comes_out_is_float32(weights, tiny):
    reduced = Clip(weights, method="test", device="cpu", dtype="bfloat16", text=False)
    pixels = normalise(torch.tensor(data.astronaut()[:128, :96]).permute(2, 0, 1)[None])
    exact, found = (each.dense(pixels, keys=True) for each in (tiny, reduced))
    for one, other in zip(exact, found, strict=True):
        assert other.dtype == torch.float32
        assert 0 < (one - other).abs().max() and torch.cosine_similarity(one, other, dim=1).min() > 0.99
    rows = reduced.embed([data.astronaut()])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert 0.99 < rows[0] @ tiny.embed([data.astronaut()])[0] < 1 - 1e-7


def test_the_digest_is_that_of_the_tensors(weights, tiny, tmp_path):
    halves = [Clip(weights, method="test", device="cpu", **half) for half in ({"vision": False}, {"text": False})]
    assert {each.digest() for each in halves} == {tiny.digest()}
    tiny._network._network.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert Clip(tmp_path, method="test", device="cpu", text=False).digest() == tiny.digest()
    other = write_model(tmp_path / "other", seed=1)
    assert Clip(other, method="test", device="cpu").digest() != tiny.digest()


def test_a_long_text_is_cut_at_its_end_with_a_warning(tmp_path, caplog):
    network = Clip(write_model(tmp_path, context=20), method="archive", device="cpu", vision=False)
    with caplog.at_level(logging.WARNING, "raypipe"):
        (short, cut) = network.tokens(["z" * 18, "z" * 18 + " and what follows"], "the query")
    assert short == cut and len(cut) == 20 and cut[-1] == network._network.tokenizer.eos_token_id
    assert "archive: 'the query' makes a text of 34 tokens, of which 20 are read: its end is cut" in caplog.text
    texts = network.texts(["z" * 30, "z" * 31], "none")
    np.testing.assert_array_equal(texts[0], texts[1])


@pytest.mark.parametrize("query", [" ", "<|endoftext|>", "<|startoftext|> <|endoftext|>"])
def test_a_text_without_a_token_is_refused(tiny, query):
    with pytest.raises(ValueError, match="maskclip: the tokenizer finds nothing in the text"):
        tiny.texts(["cat", query])


def test_texts_of_damaged_weights_are_refused(weights):
    damaged = Clip(weights, method="maskclip", device="cpu", vision=False)
    torch.nn.init.constant_(damaged._network._network.text_projection.weight, float("nan"))
    with pytest.raises(ValueError, match="maskclip: CLIP makes no finite numbers of the text 'cat'; use other weights"):
        damaged.texts(["cat"])


@pytest.mark.parametrize("absent", [{"merges.txt"}, {"vocab.json"}, {"merges.txt", "vocab.json"}])
def test_weights_without_a_complete_tokenizer_are_refused_where_texts_are_needed(weights, absent, tmp_path):
    for file in weights.iterdir():
        if file.name not in absent:
            shutil.copy(file, tmp_path)
    files = "expected vocab.json and merges.txt, or tokenizer.json"
    with pytest.raises(ValueError, match=f"reco: {tmp_path} holds no complete tokenizer .*; {files}"):
        Clip(tmp_path, method="reco", device="cpu")
    assert Clip(tmp_path, method="reco", device="cpu", text=False).embed([data.chelsea()]).shape == (1, 24)


def test_weights_of_no_clip_are_refused(tmp_path):
    from support.tiny import dino

    with pytest.raises(ValueError, match="maskclip: .* (cannot be read as|holds no) a? ?CLIPModel"):
        Clip(dino.write_model(tmp_path), method="maskclip", device="cpu")


def test_templates_settle_to_what_needs_no_file(tmp_path):
    (tmp_path / "t.txt").write_text("a {}\nzwei {} — hier\n")
    settled = settle_templates(str(tmp_path / "t.txt"))
    assert json.loads(settled) == ["a {}", "zwei {} — hier"] == list(read_templates(settled))
    assert settle_templates(settled) == settled and settle_templates("default") == "default"
    assert read_templates("none") == ("{}",)
    hashes = {clip.digest(read_templates(text)) for text in ("default", "none", settled, str(tmp_path / "t.txt"))}
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "every line must have {} where the query goes, got 'nothing'"),
        (b"a {}\na cat\n", "every line must have {} where the query goes, got 'a cat'"),
        (b"a {}\n\xff", "cannot be read as a text"),
    ],
)
def test_wrong_templates_are_refused(content, message, tmp_path):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"templates: .*{message}|templates: {message}"):
        read_templates(str(tmp_path / "t.txt"))
    with pytest.raises(FileNotFoundError, match="templates: there is no file 'defalt'; expected default, none, or a"):
        read_templates("defalt")
    for text in ("[1]", "[a {}]", "[]"):
        with pytest.raises(ValueError, match="templates: "):
            read_templates(text)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives(weights, tiny):
    images = [data.chelsea(), data.astronaut(), data.coffee()]
    pixels = normalise(torch.tensor(data.astronaut()[:128, :96]).permute(2, 0, 1)[None])
    clip._TEXTS.clear()
    exact = Clip(weights, method="test", device="cuda", dtype="float32")
    np.testing.assert_allclose(exact.texts(["cat", "a dog"]), tiny.texts(["cat", "a dog"]), atol=1e-4)
    np.testing.assert_allclose(exact.embed(images), tiny.embed(images), atol=1e-4)
    torch.testing.assert_close(exact.dense(pixels.cuda()).cpu(), tiny.dense(pixels), rtol=0, atol=1e-3)
    reduced = Clip(weights, method="test", device="cuda", text=False)
    assert (reduced.embed(images) * tiny.embed(images)).sum(1).min() > 0.99
