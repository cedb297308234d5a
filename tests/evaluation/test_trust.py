"""Trust on runs whose truth is known: it orders images and methods without a label, and says where it cannot."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture
from support.written import masks_row, write_run

from raypipe import masks, schema
from raypipe.cli.verbs import main
from raypipe.evaluation import measured as measuring
from raypipe.evaluation import signals, trust
from raypipe.evaluation.measured import SIGNALS
from raypipe.evaluation.trust import TRUST, Trust, least, read
from raypipe.run import Run, new_attempt
from raypipe.storage import hold

SIDE = 40
METHODS = ("kmeans", "watershed", "grabcut", "lost")
FACTORS = dict(zip(METHODS, (0.5, 0.6, 0.7, 2.0), strict=True))  # how wrong each is


def disk(x: float, y: float, radius: float, size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    rows, columns = np.indices(size)
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


TRUTH = disk(20, 20, 10)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * (one & other).sum() / (one.sum() + other.sum()) if one.any() or other.any() else 1.0


def made(tmp_path, factors: dict[str, float] = FACTORS, images: int = 30):
    """Runs of disks that miss TRUTH by a run's factor times an image's difficulty: (folders, Dice by run and key)."""
    rng, places, truth = np.random.default_rng(0), [], {}
    hard = np.linspace(0, 1, images)
    for name, factor in factors.items():
        table = []
        for i in range(images):
            x, y, radius = rng.normal([20, 20, 10], 9 * factor * hard[i])
            found = disk(x, y, max(radius, 2))
            truth[name, f"{i:02}.png"] = dice(found, TRUTH)
            table.append(masks_row(f"{i:02}.png", found[None]))
        rng.shuffle(table)
        places.append(str(write_run(str(tmp_path / name), table, method=name)))
    return places, truth


def table_of(place: str) -> dict[str, dict]:
    rows = pq.read_table(f"{place}/metrics/trust/trust.parquet", partitioning=None).to_pylist()
    return {row["key"]: row for row in rows}


def spearman(one, other) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_trust_orders_images_and_methods_as_their_unknown_dice_does(tmp_path):
    places, truth = made(tmp_path)
    result = trust.trust(Trust(tuple(places)))
    tables = {name: table_of(place) for name, place in zip(METHODS, places, strict=True)}
    assert pq.read_table(f"{places[0]}/{'/'.join(trust.PLACE)}", partitioning=None).schema.equals(TRUST)
    found = {(name, key): row["trust"] for name, rows in tables.items() for key, row in rows.items()}
    assert spearman([found[each] for each in sorted(truth)], [truth[each] for each in sorted(truth)]) > 0.85
    means = {name: run.trust for name, run in result.runs.items()}
    assert means["lost"] == min(means.values()) and np.mean(list(found.values())) == pytest.approx(0.5)
    assert {row["status"] for rows in tables.values() for row in rows.values()} == {"ok"}
    assert result.left_out == {"without an original: no edges, no contrast": 30}
    assert result.weights["agreement"] == 1 and result.runs["kmeans"].images == 30
    assert trust.trust(Trust(tuple(places))) == result
    ordered = sorted(tables["kmeans"].values(), key=lambda row: (row["trust"], row["image_id"]))
    assert least(Run(places[0]), 0.2) == [row["image_id"] for row in ordered[:6]]
    assert least(Run(places[0]), 0.0) == [ordered[0]["image_id"]]


def test_ranks_from_a_sample_are_nearly_those_of_all(tmp_path, monkeypatch):
    places, _ = made(tmp_path, images=60)
    trust.trust(Trust(tuple(places), originals=False))
    whole = table_of(places[0])
    monkeypatch.setattr(measuring, "SAMPLE_MASKS", 120)
    trust.trust(Trust(tuple(places), originals=False))
    sampled = table_of(places[0])
    assert len(sampled) == 60 and sampled != whole
    assert spearman([whole[key]["trust"] for key in whole], [sampled[key]["trust"] for key in whole]) > 0.95


def plain_matches(one, other, foregrounds=None):
    inverses = [] if foregrounds is None else [foregrounds.any(0) & ~mask for mask in other]
    return [max(dice(mask, each) for each in [*other, *inverses]) for mask in one]


def row_of(found: np.ndarray, foreground: np.ndarray | None = None) -> dict:
    counts = [masks.encode_rle(mask)["counts"] for mask in found]
    known = {"height": found.shape[1], "width": found.shape[2], "masks": counts}
    return known | {"foreground": None if foreground is None else masks.encode_rle(foreground)["counts"]}


def test_each_mask_is_held_against_the_nearest_of_another_run_and_against_a_label():
    rng = np.random.default_rng(0)
    foregrounds = rng.random((2, 6, 9)) < 0.8
    found = [foregrounds[0] & (rng.random((3, 6, 9)) < 0.5), foregrounds[1] & (rng.random((2, 6, 9)) < 0.4)]
    rows = [row_of(its, foreground) for its, foreground in zip(found, foregrounds, strict=True)]
    np.testing.assert_allclose(signals.matches(*rows), plain_matches(*found), atol=1e-12)
    best = plain_matches(*found, foregrounds)
    np.testing.assert_allclose(signals.matches(*rows, polarity="best"), best, atol=1e-12)
    nothing = row_of(np.zeros((0, 6, 9), bool))
    np.testing.assert_array_equal(signals.matches(nothing, nothing), [1.0])
    np.testing.assert_array_equal(signals.matches(nothing, rows[1]), [0.0])
    label = rng.random((6, 9)) < 0.4
    np.testing.assert_allclose(signals.against(rows[0], label), [dice(mask, label) for mask in found[0]])
    either = [max(dice(mask, label), dice(foregrounds[0] & ~mask, label)) for mask in found[0]]
    np.testing.assert_allclose(signals.against(rows[0], label, polarity="best"), either)
    np.testing.assert_array_equal(signals.against(nothing, label), [0.0])


def test_a_run_counts_by_how_far_all_agree_with_it_and_settings_of_a_method_share_one_voice():
    good, near, far = disk(20, 20, 10), disk(22, 20, 10), disk(8, 8, 6)
    rows = [row_of(mask[None]) for mask in (good, near, good, far)]
    apart = signals.agreements(rows, ["a", "b", "c", "d"])
    plain = [np.mean([dice(good, each) for each in (near, good, far)]), dice(far, good)]
    assert apart[0][0] > plain[0] + 0.1 and apart[3][0] < 0.1  # the one that nobody agrees with hardly counts
    two = signals.agreements(rows[:2], ["a", "b"])
    assert two[0][0] == two[1][0] == pytest.approx(dice(good, near))
    rows = [row_of(mask[None]) for mask in (far, far, far, good, near)]
    alone = signals.agreements(rows, ["a", "b", "c", "d", "e"])
    crowd = signals.agreements(rows, ["a", "a", "a", "d", "e"])
    assert crowd[3][0] > alone[3][0] + 0.2  # three settings of one method do not outvote two methods
    is_left, whole = np.indices((SIDE, SIDE))[1] < 20, disk(20, 20, 8)
    left, right = whole & is_left, whole & ~is_left
    middle = signals.agreements([row_of(mask[None]) for mask in (left, whole, right)], ["a", "b", "c"])
    one, other = dice(left, whole), dice(right, whole)  # those of left and right do not meet
    centre = np.hypot(one, other)  # the leading eigenvector is (one, centre, other)
    np.testing.assert_allclose(middle[0], centre * one / (centre + other))
    np.testing.assert_allclose(middle[2], centre * other / (centre + one))
    lonely = signals.agreements([row_of(disk(5, 5, 3)[None]), row_of(disk(30, 30, 3)[None])], ["a", "b"])
    assert [values.tolist() for values in lonely] == [[0.0], [0.0]]


def test_edges_and_contrast_are_those_of_slow_counts():
    rng = np.random.default_rng(0)
    mask, foreground = disk(20, 18, 9), disk(20, 20, 17)
    image = (rng.normal(0, 12, (SIDE, SIDE, 3)) + np.where(mask, 170, 80)[..., None]).clip(0, 255).astype(np.uint8)
    picture = signals.Picture(image)
    levels = picture._levels.astype(int)
    padded = [np.pad(each, 1) for each in (mask, foreground & ~mask)]
    near = [np.any([p[i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)], 0) for p in padded]
    band = (near[0] & foreground & ~mask) | (near[1] & mask)
    pairs = levels[band][:, None] - levels[foreground & ~band][None]
    assert picture.edges(mask, foreground) == pytest.approx((np.sign(pairs).mean() + 1) / 2)
    shifted, everywhere = np.roll(mask, 7, 1), np.ones_like(mask)
    assert picture.edges(mask, everywhere) > 0.9 > picture.edges(shifted, everywhere) + 0.1
    colours = picture._colours[foreground]
    within = sum(colours[part].var(0).sum() * part.mean() for part in (mask[foreground], ~mask[foreground]))
    assert picture.contrast(mask, foreground) == pytest.approx(1 - within / colours.var(0).sum())
    assert picture.contrast(shifted, everywhere) < picture.contrast(mask, everywhere)
    for useless in (np.zeros_like(mask), foreground):  # draws no line, tells nothing apart
        assert picture.edges(useless, foreground) == picture.contrast(useless, foreground) == 0
    flat = signals.Picture(np.full((SIDE, SIDE, 3), 90, np.uint8))
    assert np.isnan(flat.contrast(mask, foreground)) and flat.edges(mask, foreground) == pytest.approx(0.5)
    large = signals.Picture(np.kron(image, np.ones((20, 20, 1), np.uint8)))
    assert large.edges(np.kron(mask, np.ones((20, 20), bool)), np.ones((800, 800), bool)) > 0.9


def test_a_soft_mask_is_steady_where_a_shifted_threshold_moves_little():
    soft = np.zeros((4, 8), np.float32)
    soft[:, :4], soft[:, 4] = 0.9, 0.45
    assert signals.steadiness(soft, 0.5) == pytest.approx(16 / 20)
    assert signals.steadiness(soft, 0.7) == 1 and np.isnan(signals.steadiness(soft, 0.99 + 0.1))


def test_images_that_fail_or_are_in_one_run_alone_are_said(tmp_path, capsys):
    found, other = TRUTH[None], disk(24, 20, 9)[None]
    one = [masks_row(f"{i}.png", found) for i in range(4)] + [masks_row("bad.png", found, error="decode: corrupt: x")]
    one += [masks_row("none.png", found[:0]), masks_row("twice.png", found)]
    two = [masks_row("0.png", found), masks_row("1.png", other), masks_row("2.png", found[:, :30])]
    two += [masks_row("bad.png", found), *[masks_row("twice.png", found, uri=uri) | {"image_id": uri} for uri in "ab"]]
    places = [str(write_run(str(tmp_path / name), its, method=name)) for name, its in (("kmeans", one), ("lost", two))]
    assert main(["trust", *places, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = table_of(places[0])
    assert rows["bad.png"]["trust"] is None and rows["bad.png"]["status"] == "failed" and not rows["bad.png"]["masks"]
    assert rows["0.png"]["agreement"] == 1 and rows["0.png"]["masks"] == [rows["0.png"]["trust"]]
    assert rows["1.png"]["trust"] < rows["2.png"]["trust"] < rows["0.png"]["trust"]  # what is not compared: the middle
    for key in ("2.png", "3.png", "none.png", "twice.png"):
        assert rows[key]["status"] == "no other run to compare with" and rows[key]["agreement"] is None
    assert rows["none.png"]["masks"] == [] and rows["none.png"]["trust"] is not None
    assert {row["status"] for key, row in table_of(places[1]).items() if key == "twice.png"} == {"several of this key"}
    assert result["left_out"]["failed"] == 1 and result["left_out"]["several of this key"] == 2
    assert result["runs"]["kmeans"]["images"] == 6 and set(result["weights"]) == set(SIGNALS)


def photographs(folder, images: int, hard) -> list[np.ndarray]:
    """Bright disks on dark ground that fade into noise: (H, W, 3) each, also as files."""
    folder.mkdir()
    rng, found = np.random.default_rng(1), []
    for i in range(images):
        image = rng.normal(0, 10, (SIDE, SIDE, 3)) + np.where(TRUTH, 80 + 120 * (1 - hard[i]), 80)[..., None]
        found.append(image.clip(0, 255).astype(np.uint8))
        Picture.fromarray(found[-1]).save(folder / f"{i:02}.png")
    return found


def test_one_run_is_judged_by_itself_with_its_originals_its_views_and_its_soft_masks(tmp_path, capsys):
    import hashlib

    hard, rng = np.linspace(0, 1, 12), np.random.default_rng(0)
    photographs(tmp_path / "photos", 12, hard)
    table = []
    for i in range(12):
        found = disk(20 + 14 * hard[i], 20, 10)
        soft = np.where(found, 0.95 - 0.4 * hard[i], 0.05 + 0.4 * hard[i] * rng.random((SIDE, SIDE))).astype(np.float32)
        path = tmp_path / f"photos/{i:02}.png"
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        row = masks_row(path.name, found[None], uri=str(path), sha256=sha256, scores=[-hard[i]], soft=soft[None])
        row["segments"][0]["stability"] = 1 - hard[i] / 2
        table.append(row)
    place = str(
        write_run(str(tmp_path / "run"), table, method="gloper", settings={"keep_soft": True, "threshold": None})
    )
    result = trust.trust(Trust((place,)))
    rows = table_of(place)
    assert result.left_out == {} and {row["status"] for row in rows.values()} == {"ok"}
    assert result.weights["agreement"] == 0 and min(list(result.weights.values())[1:]) > 0.05
    assert spearman([rows[f"{i:02}.png"]["trust"] for i in range(12)], -hard) > 0.9
    assert rows["00.png"]["threshold"] == 1 > rows["11.png"]["threshold"] and rows["00.png"]["edges"] > 0.95
    assert rows["05.png"]["stability"] == pytest.approx(table[5]["segments"][0]["stability"])
    (tmp_path / "photos").rename(tmp_path / "moved")
    gone = trust.trust(Trust((place,)))
    assert gone.left_out == {"without an original: no edges, no contrast": 12} and gone.weights["edges"] == 0
    assert table_of(place)["00.png"]["edges"] is None
    assert trust.trust(Trust((place,), input=str(tmp_path / "moved"))) == result
    bare = str(write_run(str(tmp_path / "bare"), [row | {"segments": []} for row in table]))
    assert main(["trust", bare, "--no-originals"]) == 2
    assert "nothing was measured that tells the masks of bare apart: give runs of other" in capsys.readouterr().err
    assert not (tmp_path / "bare/metrics").exists()


def labels_of(folder, count: int) -> str:
    folder.mkdir()
    for i in range(count):
        Picture.fromarray(np.where(TRUTH, 255, 0).astype(np.uint8)).save(folder / f"{2 * i:02}.png")
    return str(folder)


def test_labels_make_trust_an_expected_dice_whose_interval_holds_what_was_promised(tmp_path, capsys):
    places, truth = made(tmp_path, images=60)
    labels = labels_of(tmp_path / "labels", 15)
    assert main(["trust", *places, "--labels", labels, "--task", "saliency", "--json"]) == 0
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert "a guess" not in text  # labels are as different as the images
    assert "15 labels; rank correlation of trust" in text and "45  images have no label of their own" in text
    result, inside, errors = json.loads(last), [], []
    for name, place in zip(METHODS, places, strict=True):
        for key, row in table_of(place).items():
            assert 0 <= row["low"] <= row["dice"] <= row["high"] <= 1
            if int(key[:2]) % 2:  # none of these has a label
                inside.append(row["low"] <= truth[name, key] <= row["high"])
                errors.append(abs(row["dice"] - truth[name, key]))
    assert np.mean(inside) > 0.85 and np.mean(errors) < 0.15
    assert result["correlation"]["low"] < result["correlation"]["value"] < result["correlation"]["high"] <= 1
    assert result["correlation"]["value"] > 0.85 and result["of_images"]["value"] > 0.85
    both = [(table_of(places[0])[key]["trust"], truth["kmeans", key]) for key in (f"{2 * i:02}.png" for i in range(15))]
    assert result["runs"]["kmeans"]["correlation"]["value"] == pytest.approx(
        spearman(*zip(*both, strict=True)), abs=0.02
    )
    rows = sorted(table_of(places[3]).values(), key=lambda row: row["trust"])
    assert (np.diff([row["dice"] for row in rows]) >= 0).all()  # more trust is never less Dice
    of_all = {f"{key[:2]}.png": row["trust"] for key, row in table_of(places[0]).items()}
    worst = labels_of(tmp_path / "worst", 0)
    for key in sorted(of_all, key=of_all.get)[:6]:
        Picture.fromarray(np.where(TRUTH, 255, 0).astype(np.uint8)).save(f"{worst}/{key}")
    assert (
        "% beyond, expected Dice and interval are a guess"
        in trust.trust(Trust((places[0], places[1]), labels=worst)).text()
    )
    few = trust.trust(Trust(tuple(places), labels=labels_of(tmp_path / "few", 3)))
    assert "fewer than 5 labels" in few.text() and table_of(places[0])["00.png"]["dice"] is None


def test_mistakes_are_told_before_anything_is_written(tmp_path, capsys):
    places, _ = made(tmp_path, {"kmeans": 0.5}, images=5)
    labels = labels_of(tmp_path / "labels", 2)
    for words, message in (
        ([], "trust needs a run"),
        ([*places, f"{places[0]}/"], "named twice"),
        ([str(tmp_path)], "not a raypipe run"),
        ([*places, "--task", "pattern"], "--task has no effect without --labels"),
        ([*places, "--labels", labels, "--task", "boxes"], "choose pattern or saliency"),
        ([*places, "--labels", str(tmp_path / "nowhere")], "nowhere"),
        ([*places, "--no-originals", "--input", "photos"], "--input and --column have no effect"),
    ):
        assert main(["trust", *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "kmeans/metrics").exists()


def test_labels_that_cannot_be_used_are_told_and_one_fits_each_run_of_its_size(tmp_path, capsys):
    places, truth = made(tmp_path, {"kmeans": 0.5, "watershed": 0.6}, images=10)
    labels = tmp_path / "labels"
    labels_of(labels, 7)  # of 00.png, 02.png, ... 12.png: two belong to no image
    (labels / "00.png").write_bytes(b"torn")
    double = [masks_row(f"{i:02}.png", np.kron(TRUTH, np.ones((2, 2), bool))[None]) for i in range(10)]
    large = str(write_run(str(tmp_path / "lost"), double, method="lost"))
    assert main(["trust", large, *places, "--labels", str(labels)]) == 0
    text = capsys.readouterr().out
    assert "4 labels; rank correlation" in text and "1  labels cannot be read\n" in text
    assert "\n00.png: " in text and "2 labels belong to no image, such as '10.png'" in text
    assert "labels have another size" not in text  # they fit two of the three runs
    assert trust.trust(Trust((large, *places), labels=str(labels))).labels == {"ok": 4, "bad_label": 1, "no_label": 5}
    wrong = labels_of(tmp_path / "wrong", 5)
    for path in (tmp_path / "wrong").iterdir():
        Picture.fromarray(np.full((9, 9), 255, np.uint8)).save(path)
    failed = write_run(str(tmp_path / "grabcut"), [masks_row("00.png", TRUTH[None], error="decode: corrupt: x")])
    for words, message in (
        ([*places, "--labels", wrong], "5 labels have another size than their image, such as '00.png'"),
        ([large, places[0]], "(--input); 20 no other run to compare with"),
        ([str(failed)], "all images of grabcut failed"),
    ):
        assert main(["trust", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_run_that_a_job_still_writes_is_measured_as_far_as_it_is(tmp_path):
    places, _ = made(tmp_path, {"kmeans": 0.5, "watershed": 0.6}, images=10)
    run, attempt = Run(places[0]), new_attempt()
    with hold(run.folder, attempt):
        rows = [masks_row(f"{i}.png", TRUTH[None]) for i in range(100, 103)]
        run.commit(attempt, 0, pa.Table.from_pylist(rows[:2], schema=schema.MASKS))
        run.write_part(f"part-{attempt}-000001.parquet", b"torn", pa.Table.from_pylist(rows[2:], schema=schema.MASKS))
        trust.trust(Trust(tuple(places)))
    assert len(table_of(places[0])) == 12 and table_of(places[0])["100.png"]["status"] == "no other run to compare with"
    before = read(run, ["key"])
    with pytest.raises(FileNotFoundError):
        trust.trust(Trust((*places, str(tmp_path))))
    assert read(run, ["key"]).equals(before)  # a failure leaves the earlier table
    assert [path.name for path in (tmp_path / "kmeans/metrics/trust").iterdir()] == ["trust.parquet"]


def test_a_condition_of_an_export_names_trust_without_a_join(tmp_path, capsys):
    places, _ = made(tmp_path, {"kmeans": 0.5, "watershed": 0.6})
    words = ["export", places[0], "--format", "csv", "--output", str(tmp_path / "out")]
    assert main([*words, "--where", "mask_trust < 0.3"]) == 2
    assert f"make it first: raypipe trust {places[0]}" in capsys.readouterr().err
    assert main([*words, "--where", "label is null or label = 'trust'", "--overwrite"]) == 0
    trust.trust(Trust(tuple(places)))
    capsys.readouterr()
    assert main([*words, "--where", "Trust < 0.3 and mask_trust < 0.3", "--overwrite", "--json"]) == 0
    exported = json.loads(capsys.readouterr().out.splitlines()[-1])["images"]
    assert exported == sum(value < 0.3 for value in read(Run(places[0]), ["trust"])["trust"].to_pylist()) > 3
    table = tmp_path.joinpath("kmeans", *trust.PLACE)
    table.write_bytes(table.read_bytes()[:-9])
    assert main([*words, "--where", "trust < 0.3", "--overwrite"]) == 2
    message = capsys.readouterr().err
    assert "trust.parquet: it does not end as a Parquet file does" in message and "raypipe trust" in message


def test_images_of_one_key_are_exported_once_each_by_their_own_trust(tmp_path, capsys):
    places, _ = made(tmp_path, {"kmeans": 0.5, "watershed": 0.6}, images=4)
    twins = [masks_row("twin.png", disk(x, 20, 9)[None]) | {"image_id": f"{x}"} for x in (20, 26)]
    place = str(write_run(str(tmp_path / "lost"), [*twins, masks_row("00.png", TRUTH[None])], method="lost"))
    trust.trust(Trust((place, *places)))
    words = ["export", place, "--format", "csv", "--output", str(tmp_path / "out"), "--json", "--where"]
    assert main([*words, "trust >= 0 and mask_trust >= 0"]) == 0
    exported = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert exported["images"] == exported["segments"] == 3


def test_every_mask_of_an_image_has_its_own_trust(tmp_path, capsys):
    rng, rows = np.random.default_rng(0), {"kmeans": [], "lost": []}
    for i in range(20):
        whole, parts = disk(20, 20, 12), [disk(8, 8, 5), disk(30, 30, 5)]
        other = [np.roll(part, int(rng.integers(1, 8)), 0) for part in parts]
        rows["kmeans"].append(masks_row(f"{i:02}.png", np.stack([whole, *parts])))
        rows["lost"].append(masks_row(f"{i:02}.png", np.stack([other[0], whole])))  # in another order, one missing
    places = [str(write_run(str(tmp_path / name), its, method=name)) for name, its in rows.items()]
    trust.trust(Trust(tuple(places)))
    found = np.array([row["masks"] for row in table_of(places[0]).values()])
    assert found.shape == (20, 3) and (found[:, 0] > found[:, 1:].max(1)).all() and found[:, 1].std() > 0.1
    words = ["export", places[0], "--format", "csv", "--output", str(tmp_path / "out"), "--json"]
    assert main([*words, "--where", "mask_trust < 0.5"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["segments"] == (found < 0.5).sum() < 60
