"""Validation by the published protocol: as a plain loop over files has it, shared out, cached, and refused in time."""

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support.golden import arrays
from support.layouts import BOXES, write_voc
from support.squares import SIZES, made, normalised, plain, plain_square, summaries

from raypipe.benchmark.plain.guided import cumulative_guided_filter
from raypipe.refiners.bilateral import Bilateral
from raypipe.segmenters.sempart.network import Head
from raypipe.storage import Folder
from raypipe.training import crops, validate
from raypipe.training.validate import Validation, Validator

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = {"max_bytes": 10**8, "max_pixels": 10**8}
# photographs are brought to 111 px for it
SMALL = SimpleNamespace(name="sempart", has_crops=True, image_size=96, resize=101)


class Network:
    """A tiny head of Sempart on features that are the reduced image, with `probabilities` as students have it."""

    def __init__(self, seed: int, photos, size: int = 96):
        self.calls = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = Head(3, hidden=4)
            for parameter in self.head.parameters():
                torch.nn.init.normal_(parameter, 0.0, 0.5)
        pixels = normalised([plain_square(each, size + 5, size) for each in sorted(photos.iterdir())[:3]])
        with torch.no_grad():  # masks of which half is foreground, and not all of it surely
            self._norms(training=True, momentum=0.8)
            logits = self._logits(pixels)
            self.head.fine.weight /= logits.std()
            self.head.fine.bias.copy_((self.head.fine.bias - logits.median()) / logits.std())

    def probabilities(self, pixels, *, batch_statistics):
        self.calls.append((len(pixels), batch_statistics))
        self._norms(training=batch_statistics, momentum=0.0)  # the running averages stay as they are
        with torch.no_grad():
            return self._logits(pixels).sigmoid()[:, 0]

    def _logits(self, pixels):
        return self.head(torch.nn.functional.avg_pool2d(pixels, 8), pixels)[1]

    def _norms(self, **settings):
        for each in self.head.modules():
            if isinstance(each, torch.nn.BatchNorm2d):
                vars(each).update(settings)


def options(place, **more) -> Validation:
    return Validation(**{"validate": "duts-te", "root": str(place)} | more)


def test_every_variant_of_table_3_is_what_a_plain_loop_gives(tmp_path):
    photos, masks = made(tmp_path)
    validator = Validator(options(tmp_path, statistics=("running", "batch")), SMALL, **LIMITS)
    for seed in (1, 2):  # a head trained without crop-zoom, and one with it
        network, output = Network(seed, photos), tmp_path / f"out{seed}"
        found = validator.write(Folder(str(output)), validator.measure(network.probabilities))
        assert network.calls == [(8, False), (8, True), (3, False), (3, True)]
        stored = summaries(output)
        assert len(stored) == 4 and len(found.runs) == 4
        for (filter, statistics), row in stored.items():
            expected = plain(photos, masks, network, filter=filter, statistics=statistics)
            shown = found.runs[f"{filter}, {statistics} statistics"].means
            assert 0.02 < expected["iou"] < 0.98, "a degenerate mask shows nothing"
            for name in ("acc", "iou", "mae", "max_f"):
                assert row[name] == shown[name] == pytest.approx(expected[name], abs=1e-6), (filter, statistics, name)
            np.testing.assert_allclose(row["f_curve"], expected["curve"], atol=1e-6)
            assert row["max_f_threshold"] == expected["best"] and row["ok"] == 11
        bins = pq.read_table(output / "metrics/size_bins").to_pylist()
        assert sum(row["images"] for row in bins) == 4 * 11
        assert {(row["filter"], row["statistics"]) for row in bins} == stored.keys()


def checked(image: np.ndarray) -> np.ndarray:
    return crops.middle(crops.shortened(image, 335), 320)


@pytest.mark.parametrize("size", SIZES)
def test_squares_are_those_of_pillow_and_torchvision(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    for image in (pixels, pixels[..., 0]):
        Image.fromarray(image).save(tmp_path / "a.png")
        assert (checked(image) == plain_square(tmp_path / "a.png", 335, 320)).all()


def test_of_a_panorama_the_middle_is_taken_and_a_pixel_is_enlarged():
    wide = np.zeros((20, 2000, 3), np.uint8)
    wide[:, 990:1010] = 200
    square = checked(wide)
    assert square.shape == (320, 320, 3) and (square[:, 160] == 200).all()
    assert (checked(wide.swapaxes(0, 1)) == square.swapaxes(0, 1)).all()
    assert (checked(np.full((1, 1, 3), 7, np.uint8)) == 7).all()


def test_masks_are_inverted_as_the_golden_case_has_them(shared):
    case = arrays(shared / "golden/saliency_evaluation/selection_and_boxes.npz")
    masks = case["pred"][:, 0]
    np.testing.assert_allclose(crops.oriented(masks, "batch"), case["inverted_batch"][:, 0], atol=1e-6)
    np.testing.assert_allclose(crops.oriented(masks, "image"), case["inverted_per_image"][:, 0], atol=1e-6)
    assert crops.oriented(masks, "none") is masks


def test_a_mean_of_one_half_is_not_inverted():
    halves = np.float32([[[0, 1]], [[0.25, 0.75]]])
    assert (crops.oriented(halves, "batch") == halves).all() and (crops.oriented(halves, "image") == halves).all()
    more = np.float32([[[0, 1]], [[0.5, 1]]])
    assert (crops.oriented(more, "batch") == 1 - more).all()
    assert (crops.oriented(more, "image") == [[[0, 1]], [[0.5, 0]]]).all()


def test_filters_are_those_of_the_paper_and_reject_nothing():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (64, 64, 3), np.uint8), np.zeros((64, 64), np.float32)
    mask[30:33, 30:33] = 0.7  # too small to survive
    guided = crops.filtered(mask, image, "guided")
    assert not (guided > 0.5).any()
    np.testing.assert_allclose(guided, cumulative_guided_filter(mask[None], image, radius=9, eps=1e-3)[0], atol=1e-5)
    solver = Bilateral(refine_sigma_space=24.0, refine_sigma_luma=4.0, refine_sigma_chroma=4.0, refine_accept_iou=0.0)
    assert (crops.filtered(mask, image, "bilateral") == solver(mask[None], image)[0][0]).all()
    assert crops.filtered(mask, image, "none") is mask


@pytest.mark.parametrize("polarity", ["batch", "image", "none"])
def test_polarities_and_the_bilateral_solver_are_those_of_the_plain_loop(tmp_path, polarity):
    photos, masks = made(tmp_path)
    network = Network(1, photos)
    network.head.fine.bias.data += 0.5  # masks of which some are mostly set
    validator = Validator(options(tmp_path, filters=("bilateral",), polarity=polarity), SMALL, **LIMITS)
    (found,) = validator.write(Folder(str(tmp_path)), validator.measure(network.probabilities)).runs.values()
    expected = plain(photos, masks, network, filter="bilateral", statistics="running", polarity=polarity)
    for name in ("acc", "iou", "mae", "max_f"):
        assert found.means[name] == pytest.approx(expected[name], abs=1e-6), name


def test_all_images_together_decide_on_global_polarity(tmp_path):
    photos, masks = made(tmp_path)
    is_inverted = []
    for shift in (-2, 2):
        network = Network(1, photos)
        network.head.fine.bias.data += shift
        validator = Validator(options(tmp_path, filters=("none",), polarity="global"), SMALL, **LIMITS)
        rows = pa.concat_tables([validator.measure(network.probabilities, rank=rank, workers=2) for rank in (1, 0)])
        (found,) = validator.write(Folder(str(tmp_path)), rows).runs.values()
        softs = [
            network.probabilities(normalised([plain_square(each, 111, 96)]), batch_statistics=False).numpy()
            for each in sorted(photos.iterdir())
        ]
        is_inverted.append(np.mean(softs) > 0.5)
        ious = []
        for each, soft in zip(sorted(masks.iterdir()), softs, strict=True):
            mask, target = (1 - soft[0] if is_inverted[-1] else soft[0]) > 0.5, plain_square(each, 111, 96) >= 128
            ious.append((mask & target).sum() / (mask | target).sum())
        assert found.means["iou"] == pytest.approx(np.mean(ious), abs=1e-4)  # alone, a pixel may flip
        assert found.counts["ok"] == 11
    assert is_inverted == [False, True]


def test_workers_share_the_batches_and_change_nothing(tmp_path):
    photos, _ = made(tmp_path, sizes=SIZES * 2)
    network, tables = Network(1, photos, size=48), []
    recipe = SimpleNamespace(name="sempart", has_crops=True, image_size=48, resize=53)
    for workers in (1, 2, 4):
        validator = Validator(options(tmp_path, statistics=("batch",)), recipe, **LIMITS)
        ranks = [pickle.loads(pickle.dumps(validator)) for _ in range(workers)]
        rows = [each.measure(network.probabilities, rank=i, workers=workers) for i, each in enumerate(ranks)]
        assert [len(each) for each in rows] == {1: [44], 2: [28, 16], 4: [16, 16, 12, 0]}[workers]
        folder = tmp_path / str(workers)
        validator.write(Folder(str(folder)), pa.concat_tables(rows[::-1]))
        files = sorted(folder.rglob("*.parquet"))
        tables.append({each.relative_to(folder): pq.read_table(each, partitioning=None) for each in files})
        assert len(files) == 6  # per image, summary and size bins of two filters
    for name, table in tables[0].items():
        for other in tables[1:]:
            one, two = (
                each.drop_columns(["run"]) if "run" in each.column_names else each for each in (table, other[name])
            )
            assert one.equals(two), name


def test_photographs_are_read_once_where_they_are_wanted_again(tmp_path):
    photos, _ = made(tmp_path, sizes=SIZES[:3])
    network = Network(1, photos)
    again, once = (Validator(options(tmp_path, validate_every=every), SMALL, **LIMITS) for every in (2, 0))
    first = again.measure(network.probabilities)
    for each in photos.iterdir():
        each.write_bytes(b"gone")
    assert again.measure(network.probabilities).equals(first)
    assert set(once.measure(network.probabilities)["status"].to_pylist()) == {"failed"}
    assert len(pickle.dumps(again)) < 20_000, "the squares stay where they are"


def test_no_more_photographs_are_kept_than_there_is_memory_for(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "MOST_KEPT", 0)
    photos, _ = made(tmp_path, sizes=SIZES[:3])
    network, validator = Network(1, photos), Validator(options(tmp_path, validate_every=2), SMALL, **LIMITS)
    first = validator.measure(network.probabilities)
    assert validator.measure(network.probabilities).equals(first)
    for each in photos.iterdir():
        each.write_bytes(b"gone")
    assert set(validator.measure(network.probabilities)["status"].to_pylist()) == {"failed"}


def test_what_cannot_be_measured_is_counted_and_named(tmp_path):
    photos, masks = made(tmp_path, sizes=SIZES[:6])
    (photos / "00.jpg").write_bytes(b"broken")
    (masks / "01.png").write_bytes(b"broken")
    Image.fromarray(np.zeros((9, 90), np.uint8)).save(masks / "02.png")
    (masks / "03.png").unlink()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(masks / "alone.png")
    calls = []

    def probabilities(pixels, *, batch_statistics):
        calls.append(len(pixels))
        soft = torch.full((len(pixels), 96, 96), 0.25)
        soft[0, 0, 0] = float("nan")
        return soft

    validator = Validator(options(tmp_path, filters=("guided",)), SMALL, **LIMITS)
    found = validator.write(Folder(str(tmp_path / "out")), validator.measure(probabilities))
    assert calls == [2]
    assert "no finite numbers for 1 images, such as '04.jpg'; try --dtype float32" in found.text()
    (run,) = found.runs.values()
    assert run.counts == {"ok": 1, "failed": 2, "no_label": 1, "other_size": 1, "bad_label": 1}
    lines = found.text().splitlines()
    for line in (
        "2 images failed: 00.jpg, 04.jpg",
        "1 labels cannot be read: 01.jpg",
        "1 labels have another size than their image: 02.jpg",
        "1 images have no label of their own: 03.jpg",
        "1 labels belong to no image: alone.png",
    ):
        assert f"all runs: {line}" in lines


def test_a_network_that_gives_no_numbers_is_named_as_the_reason(tmp_path):
    made(tmp_path, sizes=SIZES[:2])
    validator = Validator(options(tmp_path), SMALL, **LIMITS)
    rows = validator.measure(lambda pixels, batch_statistics: torch.full((len(pixels), 96, 96), float("inf")))
    with pytest.raises(ValueError, match="sempart: the network gives values that are no finite numbers for 2 images"):
        validator.write(Folder(str(tmp_path / "out")), rows)


def test_labels_are_turned_as_the_photograph_is(tmp_path):
    photos, masks = made(tmp_path, sizes=SIZES[:2])
    network, found = Network(1, photos), []
    for turn in (False, True):
        if turn:  # stored on its side, with the mask as it is stored
            exif = Image.Exif()
            exif[274] = 6
            for name in ("00", "01"):
                for path, save in ((photos / f"{name}.png", {"exif": exif}), (masks / f"{name}.png", {})):
                    source = path if path.exists() else path.with_suffix(".jpg")
                    image = Image.open(source).transpose(Image.Transpose.ROTATE_90)
                    source.unlink()
                    image.save(path, **save)
        validator = Validator(options(tmp_path), SMALL, **LIMITS)
        rows = validator.measure(network.probabilities)
        found.append(rows.drop_columns(["image_id", "key"]))
    assert found[0].equals(found[1]) and set(found[0]["status"].to_pylist()) == {"ok"}


def test_photographs_of_ones_own_have_labels_of_any_kind(tmp_path):
    photos, masks = made(tmp_path)
    for path in masks.iterdir():
        Image.fromarray((np.asarray(Image.open(path)) >= 128).astype(np.uint8)).save(path)
    network = Network(1, photos)
    mine = Validation(validate=str(photos), labels=str(masks), label_kind="nonzero")
    validator = Validator(mine, SMALL, **LIMITS)
    found = validator.write(Folder(str(tmp_path / "out")), validator.measure(network.probabilities))
    for path in masks.iterdir():
        Image.fromarray(np.asarray(Image.open(path)) * np.uint8(255)).save(path)
    for filter in ("none", "guided"):
        run = found.runs[f"{filter}, running statistics"]
        expected = plain(photos, masks, network, filter=filter, statistics="running")
        assert run.means["iou"] == pytest.approx(expected["iou"], abs=1e-6)
        assert run.published == [] and run.label_kind == "nonzero"


def test_the_papers_rows_of_sempart_stand_beside(tmp_path):
    photos, _ = made(tmp_path, sizes=SIZES[:2])
    validator = Validator(options(tmp_path), SMALL, **LIMITS)
    found = validator.write(Folder(str(tmp_path / "out")), validator.measure(Network(1, photos).probabilities))
    lines = found.text().splitlines()
    papers = (
        "Sempart (Ravindran and Basu)",
        "Sempart (Ravindran and Basu) + BF",
        "Sempart (re-implementation)",
        "Ours",
    )
    for row in (*papers, "DINO ViT-S/8, none", "iBOT ViT-S/16, crop + guided filter"):
        assert any(line.startswith(f"{row} (two_tricks, table ") for line in lines), row
    assert not any(line.startswith(("MOVE", "LOST", "SelfMask w/ Ours")) for line in lines)
    (row,) = (row for (filter, _), row in summaries(tmp_path / "out").items() if filter == "guided")
    printed = {(each["table"], each["row"], each["metric"]): each["value"] for each in row["published"]}
    assert printed["1", "Ours", "iou"] == printed["3", "DINO ViT-S/8, crop + guided filter", "iou"] == 0.787
    assert row["dataset"] == "duts-te" and row["method"] == "sempart"
    assert json.loads(row["options"])["protocol"] == "crop320" and json.loads(row["options"])["polarity"] == "batch"


def test_each_epoch_is_a_row_per_variant_and_the_selected_images_choose(tmp_path):
    photos, _ = made(tmp_path, sizes=SIZES[:5])
    (tmp_path / "list.txt").write_text("01.jpg\n\n03\n")
    folder, network = Folder(str(tmp_path / "out")), Network(1, photos)
    chosen = options(tmp_path, validate_every=1, select=str(tmp_path / "list.txt"), statistics=("batch", "running"))
    validator = Validator(chosen, SMALL, **LIMITS)
    scores = []
    for epoch in (1, 2, 3, 2):  # the second one again, as after a crash
        network.head.fine.bias.data += 0.3
        rows = validator.measure(network.probabilities)
        scores.append(validator.keep(folder, rows, epoch=epoch))
    first = [row for row in rows.to_pylist() if row["variant"] == "none, batch statistics"]
    ious = {row["key"]: row["iou"] for row in first}
    assert scores[-1] == pytest.approx((ious["01.jpg"] + ious["03.jpg"]) / 2, abs=1e-12) and len(set(scores)) == 4
    table = pq.read_table(tmp_path / "out/metrics/epochs.parquet").to_pylist()
    assert [row["epoch"] for row in table] == [1] * 4 + [2] * 4
    last = validator.write(folder, rows).runs
    for row in table[4:]:
        assert {name: row[name] for name in ("acc", "iou", "max_f", "f_half", "mae")} == last[row["variant"]].means
    assert table[4]["variant"] == "none, batch statistics" and table[4]["selected_iou"] == scores[-1]
    without = Validator(options(tmp_path, validate_every=1), SMALL, **LIMITS)
    assert without.keep(folder, without.measure(network.probabilities), epoch=3) is None


def test_statistics_that_lie_apart_are_said(tmp_path):
    photos, _ = made(tmp_path, sizes=SIZES[:4])
    network = Network(1, photos)
    for statistics, is_said in ((("running", "batch"), True), (("running",), False)):
        validator = Validator(options(tmp_path, filters=("none",), statistics=statistics), SMALL, **LIMITS)
        text = validator.write(Folder(str(tmp_path / "out")), validator.measure(network.probabilities)).text()
        assert ("--precise-bn" in text) == is_said


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"validate": None}, "--root has no effect without --validate"),
        ({"root": None}, "--validate duts-te: add --root"),
        ({"validate": "duts-tee"}, "unknown data set 'duts-tee'; did you mean .*duts-te"),
        ({"validate": "ecssd"}, "ecssd is not in"),
        ({"validate": "voc07"}, "has boxes, which are measured on a labelled run"),
        ({"labels": "masks"}, "--root has no effect with --labels"),
        ({"label_kind": "light"}, "--label-kind has no effect without --labels"),
        ({"filters": ("none", "crf")}, "--filters 'crf': expected some of none, guided, bilateral"),
        ({"filters": ("none", "none")}, "--filters names 'none' twice"),
        ({"filters": ()}, "--filters is empty"),
        ({"statistics": ("eval",)}, "--statistics 'eval': expected some of running, batch"),
        ({"polarity": "set"}, "--polarity 'set': expected one of"),
        ({"validate_every": -1}, "--validate-every must be at least 0"),
        ({"select": "list.txt"}, "--select has no effect without --validate-every"),
        ({"select": "list.txt", "validate_every": 1}, "1 of 2 lines, such as 'nowhere', name no image"),
        ({"select": "empty.txt", "validate_every": 1}, "it is empty"),
        ({"select": "none.txt", "validate_every": 1}, "none.txt"),
        ({"root": "broken"}, "cannot be measured against .*: 2 images failed, such as '00.jpg'"),
        ({"root": "dark"}, "no pixel is set in any label in .*; for labels of 0 and 1 use --labels"),
    ],
)
def test_what_is_wrong_is_said_before_a_training_starts(tmp_path, monkeypatch, wrong, text):
    made(tmp_path, sizes=SIZES[:2])
    write_voc(tmp_path / BOXES["voc07"][0], {"a": [(6, 4, 20, 12)]})
    photos, _ = made(tmp_path / "broken", sizes=SIZES[:2])
    for each in photos.iterdir():
        each.write_bytes(b"broken")
    _, masks = made(tmp_path / "dark", sizes=SIZES[:2])
    for each in masks.iterdir():
        Image.fromarray(np.asarray(Image.open(each)) // 128).save(each)
    (tmp_path / "list.txt").write_text("00.jpg\nnowhere")
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        Validator(options(tmp_path, **wrong), SMALL, **LIMITS)


def test_a_network_that_is_given_no_crops_is_not_validated(tmp_path):
    made(tmp_path, sizes=SIZES[:1])
    with pytest.raises(ValueError, match="selfmask is not given crops of photographs; label with it"):
        Validator(options(tmp_path), SimpleNamespace(name="selfmask", has_crops=False), **LIMITS)


def test_options_of_validation_load_no_network_library():
    code = "import raypipe.training.validate, sys; print({'ray', 'torch', 'cv2', 'scipy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
