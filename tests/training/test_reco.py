"""ReCo's bank: what archives it is made of, that its vectors follow their formulas, what archives may lack."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from support import archives
from support.tiny.reco import write_networks
from torch.nn.functional import interpolate

from raypipe.features.clip import Clip
from raypipe.features.dino import Dino
from raypipe.networks import IMAGENET_MEAN, IMAGENET_STD
from raypipe.run import OtherConfiguration
from raypipe.segmenters.reco import ReCo as Method
from raypipe.segmenters.reco import bank
from raypipe.training.job import Train
from raypipe.training.reco import ReCo
from raypipe.training.reco.student import ReCoMaker
from raypipe.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXTS = ("tree", "sky")


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> dict[str, str]:
    return write_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    """Twelve photographs of noise in large cells, of many sizes."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        cells = random.integers(0, 256, (6, 8, 3), np.uint8)
        size = (230 + 5 * i, 260) if i % 2 else (300, 224)
        Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(folder / f"{i:02}.png")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="module")
def archive(photos, tmp_path_factory):
    """Categories that share images with each other and with the contexts."""
    folder = tmp_path_factory.mktemp("archives")
    archives.make(folder / "contexts", {"sky": photos[9:11], "tree": [photos[11], photos[1]]})
    return archives.make(folder / "archive", {"cat": photos[:4], "dog": photos[3:7], "Traffic_light": photos[1:9:3]})


def recipe(place, nets, **options) -> ReCo:
    more = {} if options.get("context_elimination") is False else {"contexts": CONTEXTS}
    if more and "context_archive" not in options:
        more["context_archive"] = str(Path(place).parent / "contexts")
    return ReCo(**{"archive": str(place), "templates": "none"} | nets | more | options)


def made(output, its: ReCo, **options):
    """The result of a training, and its bank."""
    result = train(Train(output=str(output), local=True, **options), its)
    return result, bank.read(output, method="reco")


@pytest.fixture(scope="module")
def straight(archive, nets, tmp_path_factory):
    output = tmp_path_factory.mktemp("bank") / "out"
    return made(output, recipe(archive, nets), device="cpu")[1], output


def seen(path: str) -> torch.Tensor:
    """A photograph as the networks see it: its shorter side 224 px, the middle, normalised."""
    image = Image.open(path)
    width, height = (int(224 * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    return torch.from_numpy((pixels - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)).permute(2, 0, 1)[None]


def cosine(features, vector) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(features, vector[:, None, None], dim=0)


def reference(nets, paths, query, contexts=()) -> torch.Tensor:
    """A vector by the formulas, pixel by pixel. contexts: those to leave out."""
    dino, clip = (
        kind(Path(nets[name]), method="test", device="cpu") for kind, name in ((Dino, "backbone"), (Clip, "clip"))
    )
    text, features, weights = torch.from_numpy(clip.texts([query], "none")[0]), [], []
    for path in paths:
        patches = dino.forward(seen(path), facet="token_norm")[0]
        features.append(patches[0].T.reshape(-1, 28, 28))
        attention = (10 * cosine(clip.dense(seen(path))[0], text)).sigmoid()
        weight = interpolate(attention[None, None], size=(28, 28), mode="bilinear")[0, 0]
        for context in contexts:
            weight = weight * (1 - cosine(features[-1], context).sigmoid())
        weights.append(weight)
    flat = [each.flatten(1) / each.flatten(1).norm(dim=0) for each in features]
    chosen = []
    for one, its in zip(flat, features, strict=True):
        support = torch.stack([(one.T @ o * w.flatten()).amax(1) for o, w in zip(flat, weights, strict=True)]).mean(0)
        chosen.append(its.flatten(1)[:, support.argmax()])
    mean = torch.stack(chosen).mean(0)
    return mean / mean.norm()


def test_every_vector_is_what_its_formulas_say(straight, photos, nets):
    found, _ = straight
    tree = reference(nets, [photos[11], photos[1]], "tree")
    sky = reference(nets, photos[9:11], "sky", [tree])
    np.testing.assert_allclose(found.contexts, torch.stack([tree, sky]), atol=1e-5)
    expected = {"cat": photos[:4], "dog": photos[3:7], "Traffic_light": photos[1:9:3]}
    assert found.names == tuple(expected)
    for vector, (name, paths) in zip(found.vectors, expected.items(), strict=True):
        np.testing.assert_allclose(vector, reference(nets, paths, name, [tree, sky]), atol=1e-5)
    texts = Clip(Path(nets["clip"]), method="test", device="cpu").texts(list(expected), "none")
    assert np.array_equal(found.texts, texts)


def test_the_folder_says_all_that_the_bank_was_made_of_and_labels(straight, nets):
    found, output = straight
    assert {"backbone", "clip"} & found.config.keys() and found.config["contexts"] == ["tree", "sky"]
    assert [each["images"] for each in found.config["classes"]] == [4, 4, 3]
    assert found.config["slices"] == "corrected" and found.config["training"]["k"] == 50
    assert json.loads((output / "training.json").read_text())["images"] == 11
    page = (output / "training.html").read_text()
    assert "What the images have in common" in page and "Traffic_light" in page and "Loss" not in page
    method = Method(weights=str(output), short_side=64, background_score="softmax100", threshold=0.0)
    method.load("cpu")
    (labelled,) = method.segment([np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)])
    assert set(labelled.labels) <= set(found.names) and labelled.index.min() == 1


def test_an_image_is_looked_at_once_however_many_categories_it_serves(archive, nets, tmp_path, monkeypatch):
    looked, look = [], ReCoMaker._look

    def counted(self, samples):
        looked.extend(samples)
        return look(self, samples)

    monkeypatch.setattr(ReCoMaker, "_look", counted)
    made(tmp_path / "out", recipe(archive, nets))
    assert len(looked) == 11 and max(len(each["serves"]) for each in looked) == 3  # 15 places of 11 images


def test_k_takes_the_best_and_options_change_the_vectors(archive, nets, photos, straight, tmp_path):
    one = made(tmp_path / "one", recipe(archive, nets, k=1, context_elimination=False))[1]
    np.testing.assert_allclose(one.vectors[0], reference(nets, photos[:1], "cat"), atol=1e-5)
    assert len(one.contexts) == 0 and one.config["classes"][0]["images"] == 1
    for i, options in enumerate([{"slices": "released"}, {"text_attention": False}, {"text_temperature": 50.0}]):
        other = made(tmp_path / str(i), recipe(archive, nets, **options))[1]
        assert np.abs(other.vectors - straight[0].vectors).max() > 1e-4, options


def test_classes_choose_bind_by_name_and_order_and_contexts_are_taken_as_they_are(archive, nets, straight, tmp_path):
    names = "[Vegetation, traffic light, sky, {name: DOG, query: a black dog}]"
    found = made(tmp_path / "out", recipe(archive, nets, classes=names))[1]
    assert found.names == ("Vegetation", "traffic light", "sky", "DOG")
    np.testing.assert_allclose(found.vectors[[0, 2]], straight[0].contexts, atol=1e-6)
    np.testing.assert_allclose(found.vectors[1], straight[0].vectors[2], atol=1e-6)
    assert [each["query"] for each in found.config["classes"]][1:] == ["Traffic_light", "sky", "a black dog"]
    assert found.config["training"]["classes"].startswith("[")


def test_published_archive_files_are_read(archive, nets, photos, straight, tmp_path):
    file = tmp_path / "archive.json"
    held = {"dog": photos[3:7], "cat": photos[:4], "sky": photos[9:11], "tree": [photos[11], photos[1]]}
    file.write_text(json.dumps(held))
    its = recipe(file, nets, context_archive=None, classes="cat,dog")
    np.testing.assert_allclose(made(tmp_path / "out", its)[1].vectors, straight[0].vectors[:2], atol=1e-6)


def test_images_of_one_name_in_two_archives_stay_apart(nets, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.open(photos[5]).save(other / "00.png")
    its = recipe(archives.make(tmp_path / "a", {"cat": photos[:2]}), nets, context_elimination=False)
    assert made(tmp_path / "one", its)[0].images == 2
    archives.make(tmp_path / "c", {"tree": [other / "00.png"]})
    its = recipe(tmp_path / "a", nets, contexts=("tree",), context_archive=str(tmp_path / "c"))
    result, found = made(tmp_path / "two", its)
    assert result.images == 3
    np.testing.assert_allclose(found.contexts[0], reference(nets, [photos[5]], "tree"), atol=1e-5)


def test_what_archives_lack_is_named_with_the_way_out(archive, nets, photos, tmp_path):
    def error(**options) -> str:
        with pytest.raises(ValueError) as found:
            recipe(options.pop("place", archive), nets, **options).rows(None)
        return str(found.value)

    text = error(contexts=("tree", "road", "person"))
    assert text.startswith("reco: no images of the contexts 'road', 'person' in ") and "contexts and " in text
    assert "make them with `raypipe archive --input CORPUS --classes road,person --n 50 --output DIR --con" in text
    text = error(classes="cat,cow")
    assert text.startswith(f"reco: {archive} has no images of 'cow'; ") and "cat" in text
    none = archives.make(tmp_path / "none", {"cat": photos[:1], "dog": []})
    assert "has no images of 'dog'" in error(place=none, context_elimination=False)
    assert "image_root has no effect" in error(image_root="/tmp")
    with pytest.raises(FileNotFoundError, match="so it is no archive; make one with raypipe archive"):
        recipe(tmp_path, nets).rows(None)
    with pytest.raises(ValueError, match="--input has no effect: the images are those of --archive"):
        train(Train(output=str(tmp_path / "out"), input=str(Path(photos[0]).parent), local=True), recipe(archive, nets))


def test_broken_images_are_left_out_and_a_category_without_any_is_named(nets, photos, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"none")
    its = recipe(archives.make(tmp_path / "a", {"cat": [broken, photos[0]]}), nets, context_elimination=False)
    result, found = made(tmp_path / "one", its)
    assert list(result.skipped) == ["broken.png"] and found.config["classes"][0]["images"] == 1
    np.testing.assert_allclose(found.vectors[0], reference(nets, photos[:1], "cat"), atol=1e-5)
    its = recipe(archives.make(tmp_path / "b", {"cat": [photos[0]], "dog": [broken]}), nets, context_elimination=False)
    with pytest.raises(ValueError, match="none of the images of 'dog' can be used, see skipped.parquet; leave it out"):
        made(tmp_path / "two", its)


@pytest.mark.parametrize(("field", "tensor"), [("backbone", "layernorm.weight"), ("clip", "visual_projection.weight")])
def test_a_network_that_gives_no_finite_numbers_makes_no_bank(field, tensor, archive, nets, tmp_path):
    damaged = shutil.copytree(nets[field], tmp_path / field)
    tensors = load_file(damaged / "model.safetensors")
    tensors[tensor][:] = np.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="reco: the features of 'cat' are no finite numbers; try --dtype float32"):
        made(tmp_path / "out", recipe(archive, nets | {field: str(damaged)}, k=1, context_elimination=False))
    assert not (tmp_path / "out" / "config.json").exists()


def test_another_archive_or_option_is_another_bank(archive, nets, photos, straight, tmp_path):
    output = straight[1]
    assert not train(Train(output=str(output), local=True), recipe(archive, nets)).is_new
    with pytest.raises(OtherConfiguration, match="k: 50 there, 5 now"):
        train(Train(output=str(output), local=True), recipe(archive, nets, k=5))
    (output / "_runs/finished.json").unlink()  # as if it had been killed at the very end
    again = made(output, recipe(archive, nets))
    assert again[0].is_new and np.array_equal(again[1].vectors, straight[0].vectors)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"text_temperature": 0.0}, "text_temperature must be a finite number above 0"),
        ({"contexts": ()}, "contexts must be names, each once; without any, pass --no-context-elimination"),
        ({"contexts": ("tree", "Tree")}, "contexts must be names, each once"),
        ({"slices": "literal"}, "unknown slices 'literal'"),
        ({"context_elimination": False, "context_archive": "a"}, "context_archive has no effect without"),
        ({"classes": "cat,Cat"}, "CLIP would be asked the same"),
    ],
)
def test_options_that_cannot_work_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        ReCo(archive="archive", **options)


@pytest.mark.slow
def test_images_gathered_on_ray_make_the_same_bank(archive, nets, straight, tmp_path):
    pytest.importorskip("ray")
    train(Train(output=str(tmp_path / "out"), device="cpu"), recipe(archive, nets))
    found = load_file(tmp_path / "out" / bank.FILE)
    assert np.array_equal(found["vectors"], straight[0].vectors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_bank_of_the_cpu(archive, nets, straight, tmp_path):
    found = made(tmp_path / "out", recipe(archive, nets, dtype="float32"), device="cuda")[1]
    np.testing.assert_allclose(found.vectors, straight[0].vectors, atol=1e-3)
