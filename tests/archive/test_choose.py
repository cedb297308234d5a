"""Which ranked images an archive keeps, and why it keeps not the others."""

import numpy as np
import pyarrow as pa
import pytest

from raypipe.archive import retrieval
from raypipe.archive.choose import choose, over_fetch

WIDTH = 64
BITS = np.random.default_rng(5).integers(0, 2**63, 5000)  # perceptual hashes that are far apart


class Corpus:
    """A table of embeddings whose image i has the cosine 0.9 - i / 10,000 to the first query, falling with i."""

    def __init__(self, count):
        rng = np.random.default_rng(0)
        cosines = 0.9 - np.arange(count) / 10_000
        rest = rng.normal(size=(count, WIDTH - 2))
        rest *= np.sqrt(1 - cosines**2)[:, None] / np.linalg.norm(rest, axis=1, keepdims=True)
        vectors = np.concatenate([cosines[:, None], np.zeros((count, 1)), rest], axis=1)
        self.queries, self.asked = np.eye(2, WIDTH, dtype=np.float32), []
        self.rows = [
            {"image_id": f"{i:04d}", "key": f"{i}.jpg", "uri": f"/{i}.jpg", "sha256": f"s{i}", "phash": int(BITS[i])}
            | {"height": 90, "width": 120, "embedding": vector.astype(np.float32), "error": ""}
            for i, vector in enumerate(vectors)
        ]

    def table(self):
        columns = {name: pa.array([row[name] for row in self.rows]) for name in self.rows[0] if name != "embedding"}
        columns["phash"] = columns["phash"].cast(pa.uint64())
        vectors = pa.array([row["embedding"] for row in self.rows], pa.list_(pa.float32(), WIDTH))
        return pa.table(columns | {"embedding": vectors})

    def choose(self, categories, n, **options):
        table = self.table()

        def rank(chosen, k):
            self.asked.append((list(chosen), k))
            return retrieval.rank([table], self.queries[chosen], k).result()

        return choose(categories, n, rank=rank, look_up=lambda ids: retrieval.look_up([table], ids), **options)


def kept(found, category="cat"):
    return [row["image_id"] for row in found.members.to_pylist() if row["category"] == category]


def rejected(found):
    return {row["key"]: row["reason"] for row in found.rejects.to_pylist()}


def test_the_first_n_good_images_are_kept_and_each_that_is_left_out_has_its_reason():
    corpus = Corpus(30)
    corpus.rows[1]["sha256"] = "s0"
    corpus.rows[2]["phash"] = corpus.rows[0]["phash"] ^ 0b1111
    corpus.rows[3]["phash"] = corpus.rows[0]["phash"] ^ 0b11111  # five bits: another image
    corpus.rows[4]["height"] = 15
    corpus.rows[5] |= {"height": 1000, "width": 49}
    corpus.rows[6] |= {"height": 1000, "width": 50}
    corpus.rows[7]["embedding"] = corpus.rows[6]["embedding"]
    corpus.rows[9]["sha256"] = "s8"
    found = corpus.choose(["cat"], 5, refuse=lambda rows: {"0008": "unsafe", "0029": "broken"})
    assert kept(found) == ["0000", "0003", "0006", "0009", "0010"]  # 9 is the copy of one that was not kept
    assert rejected(found) == {
        "1.jpg": "duplicate",
        "2.jpg": "near_duplicate",
        "4.jpg": "tiny",
        "5.jpg": "aspect",
        "7.jpg": "near_duplicate",
        "8.jpg": "unsafe",
    }
    assert found.members["rank"].to_pylist() == [0, 1, 2, 3, 4] and found.short == []
    np.testing.assert_allclose(found.members["score"].to_numpy()[:2], [0.9, 0.8997], atol=1e-6)
    assert found.members["uri"].to_pylist()[0] == "/0.jpg" and corpus.asked == [([0], over_fetch(5))]


def test_a_category_that_comes_out_short_is_ranked_again_deeper_and_alone(monkeypatch):
    corpus = Corpus(600)
    for row in corpus.rows[:400]:
        row["sha256"] = "same"
    asked = []

    def refuse(rows):
        asked.extend(rows["image_id"].to_pylist())
        return {}

    found = corpus.choose(["cat", "dog"], 10, refuse=refuse)
    assert kept(found) == ["0000", *(f"{i:04d}" for i in range(400, 409))]
    assert len(found.rejects.filter(pa.compute.equal(found.rejects["category"], "cat"))) == 399
    assert corpus.asked[0] == ([0, 1], 77) and [k for _, k in corpus.asked] == [77, 154, 308, 616]
    assert len(kept(found, "dog")) == 10 and len(asked) == len(set(asked))  # each image is looked at once
    monkeypatch.setattr("raypipe.archive.choose.over_fetch", lambda n: 10_000)
    assert corpus.choose(["cat", "dog"], 10) == found  # as all images ranked at once give


def test_categories_that_lack_images_are_named_and_keep_what_there_is():
    corpus = Corpus(7)
    found = corpus.choose(["cat", "dog"], 8, refuse=lambda rows: {"0003": "unsafe"})
    assert kept(found) == ["0000", "0001", "0002", "0004", "0005", "0006"] and found.short == ["cat", "dog"]
    assert found.members.schema.names == ["category", "rank", "image_id", "key", "uri", "score"]
    for row in corpus.rows:
        row["error"] = "decode: corrupt: cut"
    nothing = corpus.choose(["cat"], 8)
    assert len(nothing.members) == len(nothing.rejects) == 0 and nothing.short == ["cat"]


@pytest.mark.parametrize(("n", "expected"), [(500, 714), (50, 129), (1, 66)])
def test_three_tenths_and_64_more_are_ranked_than_wanted(n, expected):
    assert over_fetch(n) == expected
