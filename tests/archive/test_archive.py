"""The verb, in this process: what it writes, what it leaves out and says, and when it has nothing to do."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from support.corpora import contents, draw, wanted
from support.tiny import _clip

from raypipe import networks
from raypipe.archive.archive import archive
from raypipe.features.clip import Clip
from raypipe.inputs import archives
from raypipe.inputs.manifest import list_inputs
from raypipe.maintenance.compact import Compact, compact
from raypipe.maintenance.verify import Verify, verify
from raypipe.run import OtherConfiguration, Run, rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _clip.write_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def photos(tmp_path):
    draw(tmp_path / "photos", range(24))
    return tmp_path / "photos"


@pytest.fixture
def run(tmp_path, photos, model, one_thread):
    """Makes an archive of the photographs of three categories with four images each."""

    def call(output="out", **options):
        return archive(wanted(photos, tmp_path / output, model, **{"local": True} | options))

    return call


def summary(folder: Path) -> dict[str, float]:
    return {row["name"]: row["value"] for row in pq.read_table(folder / "archive_summary.parquet").to_pylist()}


def test_each_category_gets_the_images_that_clip_finds_closest(run, tmp_path, photos, model):
    made = run()
    assert (made.exit_code, made.embedded, made.pending, made.is_new) == (0, 24, 0, True)
    network = Clip(networks.locate(str(model), method="test"), method="test", device="cpu")
    keys = sorted(path.name for path in photos.iterdir())
    images = network.embed([np.asarray(Image.open(photos / key)) for key in keys])
    scores = images.astype(np.float16).astype(np.float32) @ network.texts(["cat", "dog", "tree frog"]).T
    members = pq.read_table(tmp_path / "out" / "archive.parquet")
    assert members.schema.equals(archives.MEMBERS)
    for c, category in enumerate(["cat", "dog", "tree frog"]):
        best = np.argsort(-scores[:, c], kind="stable")[:4]
        its = members.filter(pa.compute.equal(members["category"], category))
        assert its["key"].to_pylist() == [keys[i] for i in best]
        assert its["rank"].to_pylist() == [0, 1, 2, 3]
        np.testing.assert_allclose(its["score"], scores[best, c], atol=1e-6)
    page = (tmp_path / "out" / "archive.html").read_text()
    assert (
        page.count("data:image/jpeg") >= 12
        and "tree frog" in page
        and str(tmp_path) not in page.replace(str(model), "")
    )
    assert "embeddings: clip" in page and "None" not in page


def test_the_embedding_table_is_a_run_like_any_other(run, tmp_path, photos):
    Path(photos, "broken.png").write_bytes(b"no picture")
    run()
    table = Run(str(tmp_path / "out"))
    found = rows.load(table)
    assert (table.table, table.method, len(found)) == ("embeddings", "clip", 25)
    assert found["embedding"].type == pa.list_(pa.float16()) and found["phash"].type == pa.uint64()
    (bad,) = [row for row in found.to_pylist() if row["error"]]
    assert (bad["key"], bad["embedding"], bad["phash"]) == ("broken.png", None, None)
    (reject,) = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert (reject["key"], reject["category"], reject["reason"]) == ("broken.png", None, "broken")
    assert verify(Verify(str(tmp_path / "out"), deep=True)).problems == []
    before = contents(tmp_path / "out")
    assert compact(Compact(str(tmp_path / "out"))).parts_after == 1
    assert verify(Verify(str(tmp_path / "out"), deep=True)).problems == []
    assert not run().is_new and contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match="holds embeddings, not masks"):
        list(rows.select(table))


def test_damage_is_found_repaired_and_embedded_again(run, tmp_path):
    run()
    before = contents(tmp_path / "out")
    (part,) = (tmp_path / "out" / "embeddings" / "method=clip").iterdir()
    part.write_bytes(part.read_bytes()[:-9])
    found = verify(Verify(str(tmp_path / "out"), repair=True))
    assert [problem.kind for problem in found.problems] == ["torn"] and found.removed == 1
    assert found.commands[0].startswith("raypipe archive --input")
    assert run().embedded == 24 and contents(tmp_path / "out") == before


def test_a_second_call_does_nothing_and_says_so(run, tmp_path):
    run()
    before = contents(tmp_path / "out")
    os.utime(tmp_path / "out" / "archive.json", (1, 1))
    made = run()
    assert (made.embedded, made.is_new) == (0, False) and "nothing to do" in made.text()
    assert (tmp_path / "out" / "archive.json").stat().st_mtime == 1 and contents(tmp_path / "out") == before


def test_new_categories_repeat_the_ranking_alone(run, tmp_path):
    run()
    made = run(classes="bird,cat")
    assert (made.embedded, made.is_new) == (0, True)
    run("other", classes="bird,cat")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_new_images_are_embedded_alone_and_ranked_with_the_others(run, tmp_path, photos):
    draw(photos, range(30, 34))
    hidden = [photos / f"{i:04d}.png" for i in range(30, 34)]
    for path in hidden:
        path.rename(tmp_path / path.name)
    assert run().embedded == 24
    for path in hidden:
        (tmp_path / path.name).rename(path)
    assert run().embedded == 4
    run("other")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_no_archive_is_made_before_all_images_are_embedded(run, tmp_path):
    made = run(limit=10)
    assert (made.pending, made.summary) == (14, {}) and "the same command goes on" in made.text()
    assert not (tmp_path / "out" / "archive.json").exists()
    assert run().embedded == 14
    run("other")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_an_archive_that_was_not_written_to_its_end_is_written_again(run, tmp_path):
    run()
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "archive.json").unlink()  # goes first and comes last
    (tmp_path / "out" / "archive.parquet").write_bytes(b"half")
    made = run()
    assert (made.embedded, made.is_new) == (0, True) and contents(tmp_path / "out") == before


def test_an_archive_that_has_lost_a_file_or_a_part_of_one_is_written_again(run, tmp_path):
    run()
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "archive_summary.parquet").unlink()
    assert run().is_new and contents(tmp_path / "out") == before
    (tmp_path / "out" / "manifest.parquet").write_bytes(before["manifest.parquet"][:-9])
    assert run().is_new and contents(tmp_path / "out") == before
    assert not run().is_new


def test_another_model_on_the_same_output_is_refused(run, tmp_path):
    run()
    other = _clip.write_model(tmp_path / "other", seed=1)
    with pytest.raises(OtherConfiguration, match="clip"):
        run(clip=str(other))
    with pytest.raises(OtherConfiguration, match="table"):
        run(exact=True)
    copy = _clip.write_model(tmp_path / "changed")
    run("changing", clip=str(copy))
    _clip.write_model(copy, seed=2)
    with pytest.raises(OtherConfiguration, match="other weights"):
        run("changing", clip=str(copy), classes="cat")


def test_fewer_images_than_asked_for_are_all_there_are_and_none_fails_the_category(run, tmp_path, photos):
    table = pa.table({"path": sorted(map(str, photos.iterdir())), "punsafe": [i / 24 for i in range(24)]})
    pq.write_table(table, tmp_path / "corpus.parquet")
    corpus = {"input": str(tmp_path / "corpus.parquet"), "safety": True, "column": "path"}
    made = run(**corpus, where="punsafe < 3/24")
    assert made.exit_code == 0 and made.short == ["cat", "dog", "tree frog"] and "fewer" in made.text()
    members = archives.read(str(tmp_path / "out")).members
    assert set(members["key"].to_pylist()) == {str(photos / f"{i:04d}.png")[1:] for i in range(3)}
    assert summary(tmp_path / "out")["left_out_by_where"] == 21
    made = run(**corpus, where="punsafe < 0")
    assert made.exit_code == 3 and made.empty == ["cat", "dog", "tree frog"] and "no image for 3" in made.text()
    for wrong, text in (
        ("nsfw < 1", "path, punsafe"),
        ("punsafe <", "--where"),
        (" ", "--where: expected a condition"),
        ("path < 3", "--where"),
    ):
        with pytest.raises(ValueError, match=text):
            run(**corpus, where=wrong)
    with pytest.raises(ValueError, match="has no columns"):
        run(safety=True, where="punsafe < 1")


def test_a_list_has_columns_too_and_an_image_is_left_out_where_one_of_its_rows_is(run, tmp_path, photos):
    names = sorted(photos.iterdir())
    lines = [f"{path},{'bad' if i < 20 else 'good'}" for i, path in enumerate(names)] + [f"{names[23]},bad"]
    (tmp_path / "corpus.csv").write_text("\n".join(["path,tag", *lines]))
    run(input=str(tmp_path / "corpus.csv"), safety=True, where="tag = 'good'")
    members = archives.read(str(tmp_path / "out")).members
    assert set(members["uri"].to_pylist()) == {str(path) for path in names[20:23]}


@pytest.mark.parametrize("options, text", [
    ({"safety": True}, "nothing keeps unsafe images out"),
    ({"concepts": "default"}, "--no-safety has no effect"),
    ({"faces": None}, "nothing keeps faces of people out"),
    ({"face_score": 0.5}, "--face-score 0.5 has no effect"),
    ({"faces": "missing.onnx"}, "missing.onnx"),
    ({"n": 0}, "--n must be positive"),
    ({"actors": 2}, "--actors has no effect with --local"),
    ({"known": "species"}, "has no columns"),
    ({"classes": "cat,Cat"}, "cat"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(run, tmp_path, options, text):
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_purity_counts_images_whose_known_label_is_their_category(run, tmp_path, photos):
    labels = "".join(f"{i:04d}.png,{'Tree_frog' if i % 2 else 'cat'}\n" for i in range(20))
    (tmp_path / "known.csv").write_text(labels)
    run(known=str(tmp_path / "known.csv"))
    members = archives.read(str(tmp_path / "out")).members.to_pylist()
    known = [(row["category"], int(row["key"][:4])) for row in members if row["key"] < "0020"]
    right = [category == ("tree frog" if i % 2 else "cat") for category, i in known]
    assert summary(tmp_path / "out")["purity"] == pytest.approx(np.mean(right))
    assert summary(tmp_path / "out")["purity_known"] == len(known)


def test_duplicates_stand_once_in_a_category_and_strange_shapes_never(run, tmp_path, photos):
    os.link(photos / "0000.png", photos / "copy.png")
    draw(photos, [50], size=(15, 40))
    draw(photos, [51], size=(20, 500))
    run(n=30)
    rejects = {(row["key"], row["reason"]) for row in pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()}
    assert {("copy.png", "duplicate"), ("0050.png", "tiny"), ("0051.png", "aspect")} <= rejects
    assert not {"0050.png", "0051.png"} & set(archives.read(str(tmp_path / "out")).images["key"].to_pylist())


def test_an_embedding_that_is_not_finite_is_an_error_and_never_compared(run, tmp_path):
    damaged = _clip.write_model(tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["visual_projection.weight"][0, 0] = np.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    made = run(clip=str(damaged))
    errors = pq.read_table(tmp_path / "out" / "errors.parquet")
    assert set(errors["kind"].to_pylist()) == {"not_finite"} and len(errors) == made.failed == 24
    assert made.exit_code == 3 and made.empty == ["cat", "dog", "tree frog"]
    assert summary(tmp_path / "out")["rejected_not_finite"] == 24


def test_an_archive_is_labelled_once_per_image_under_the_ids_of_the_corpus(run, tmp_path, photos):
    run()
    of_corpus = set(list_inputs(str(photos))["image_id"].to_pylist())
    images = list_inputs(str(tmp_path / "out"))
    assert len(set(images["image_id"].to_pylist())) == len(images) and set(images["image_id"].to_pylist()) <= of_corpus
    settings = json.loads((tmp_path / "out" / "archive.json").read_text())
    assert settings["n"] == 4 and settings["classes"][2] == {"name": "tree frog", "query": "tree frog"}
