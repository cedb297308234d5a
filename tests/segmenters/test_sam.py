"""SAM's mask generator as a whole against the plain one, what becomes of its masks, and both kinds of weights."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from skimage import data
from support.tiny.sam import LOW, record, write_model
from transformers import SamConfig, SamModel

from raypipe.benchmark.plain import sam as plain_sam
from raypipe.segmenters.sam import LABELS, Sam, complementary, generator, inside_foreground
from raypipe.segmenters.sam import network as model

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = {"box_nms_thresh": 1.0, "crop_nms_thresh": 1.0}
OFFICIAL = (  # transformers' names to the official ones
    (r"shared_image_embedding\..*", ""),
    (
        r"prompt_encoder\.shared_embedding\.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"vision_encoder\.layers", "image_encoder.blocks"),
    (r"vision_encoder", "image_encoder"),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"neck\.conv1", "neck.0"),
    (r"neck\.layer_norm1", "neck.1"),
    (r"neck\.conv2", "neck.2"),
    (r"neck\.layer_norm2", "neck.3"),
    (r"point_embed\.", "point_embeddings."),
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"layer_norm", "norm"),
    (r"mask_decoder\.upscale_conv1", "mask_decoder.output_upscaling.0"),
    (r"mask_decoder\.upscale_norm", "mask_decoder.output_upscaling.1"),
    (r"mask_decoder\.upscale_conv2", "mask_decoder.output_upscaling.3"),
    (r"(mlps\.\d|head)\.layers\.0", r"\1.layers.1"),
    (r"(mlps\.\d|head)\.proj_in", r"\1.layers.0"),
    (r"(mlps\.\d|head)\.proj_out", r"\1.layers.2"),
)


def write_official(folder: Path, file: Path) -> Path:
    """The same weights as an official checkpoint: their names, and the positions once."""
    tensors = {}
    for name, tensor in SamModel.from_pretrained(folder).state_dict().items():
        for pattern, official in OFFICIAL:
            name = re.sub(pattern, official, name)
        tensors[name] = tensor
    del tensors[""]
    torch.save(tensors, file)
    return file


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("sam"))


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return cv2.resize(data.astronaut(), (220, 180), interpolation=cv2.INTER_AREA)


def loaded(weights, device: str = "cpu", **options) -> Sam:
    method = Sam(weights=str(weights), **{"preset": "library", **LOW, **options})
    method.load(device)
    return method


def pasted(records, size) -> np.ndarray:
    return np.array([record.paste(np.zeros(size, bool)) for record in records], bool).reshape(-1, *size)


def best_ious(ours: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Mean best IoU that a mask has with the other set's, both ways. bool (N, H, W), none empty."""
    a, b = (found.reshape(len(found), -1).astype(np.float32) for found in (ours, others))
    shared = a @ b.T
    overlap = shared / (a.sum(1)[:, None] + b.sum(1) - shared)  # (N, M)
    return overlap.max(1).mean(), overlap.max(0).mean()


# The whole generator


@pytest.mark.parametrize(
    "options",
    [
        {},
        ALL,
        {"box_nms_thresh": 0.98, "crop_nms_thresh": 0.98, "crop_n_layers": 1},
        {**ALL, "crop_n_layers": 1, "points_per_batch": 13, "crops_per_batch": 2},
        {**ALL, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2, "pred_iou_thresh": 0.5},
    ],
)
def test_the_generator_gives_the_plain_generators_masks_in_its_order(weights, photo, options):
    method = loaded(weights, **options)
    ours, plain = method.generate(photo), plain_sam.generate(method, photo)
    assert ours and len(ours) == len(plain)
    for one, other in zip(ours, plain, strict=True):
        assert np.abs(np.subtract(one.box, other["box"])).max() <= 1
        assert one.score == pytest.approx(other["score"], abs=1e-4)
        assert one.stability == pytest.approx(other["stability"], abs=0.01)
        assert one.point == pytest.approx(other["point"]) and list(one.crop[:4]) == other["crop"]
    masks = pasted(ours, photo.shape[:2])
    assert [one.area for one in ours] == masks.sum((1, 2)).tolist()
    assert plain_sam.agreement(masks, plain_sam.masks(method, photo)) >= 0.99


def test_filters_really_drop_masks_and_crops_really_add_some(weights, photo):
    everything = loaded(weights, **ALL, pred_iou_thresh=0.0, stability_score_thresh=0.0).generate(photo)
    good = loaded(weights, **ALL, stability_score_thresh=0.0).generate(photo)
    stable = loaded(weights, **ALL).generate(photo)
    assert len(everything) > len(good) > len(stable) > 0
    assert min(one.score for one in everything) <= 0.61 < min(one.score for one in good)
    assert min(one.stability for one in good) < 0.83 <= min(one.stability for one in stable)
    crops = loaded(weights, **ALL, crop_n_layers=1).generate(photo)
    assert len(crops) > len(stable) and crops[0].crop.layer == 1 and crops[-1].crop.layer == 0


def test_only_candidates_with_a_good_predicted_iou_are_upsampled(weights, photo, monkeypatch):
    counts, upsample = [], generator.upsample
    monkeypatch.setattr(
        generator, "upsample", lambda logits, **sizes: counts.append(len(logits)) or upsample(logits, **sizes)
    )
    method = loaded(weights, **ALL, stability_score_thresh=0.0)
    found = method.generate(photo)
    assert 0 < sum(counts) - len(found) < 8 * 8 * 3  # those that pass, and in the end once more for their pixels
    assert sum(counts[:-1]) == len(found)


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (5, 5), (40, 60)])
@pytest.mark.parametrize("options", [{"crop_n_layers": 2}, {"crop_n_layers": 1, "min_mask_region_area": 9}])
def test_small_and_one_colour_images_are_answered(weights, size, options):
    for colour in (0, 255):
        found = loaded(weights, **options, points_per_side=2).generate(np.full((*size, 3), colour, np.uint8))
        assert pasted(found, size).any((1, 2)).all()


def test_in_bfloat16_masks_stay_and_predicted_ious_do_not_tie(weights, photo):
    options = ALL | {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    exact, reduced = (loaded(weights, **options, dtype=dtype).generate(photo) for dtype in ("float32", "bfloat16"))
    scores = [[one.score for one in found] for found in (exact, reduced)]
    assert scores[0] != scores[1] and len(scores[0]) == len(scores[1]) == 8 * 8 * 3
    np.testing.assert_allclose(scores[0], scores[1], atol=0.01)
    assert len(set(scores[1])) > 0.98 * len(scores[1]) > 100 > len(torch.tensor(scores[0]).bfloat16().unique())
    assert min(best_ious(*(pasted(found, photo.shape[:2]) for found in (exact, reduced)))) > 0.98


# What becomes of the masks


def test_complementary_masks_split_the_foreground():
    foreground = np.zeros((10, 10), bool)
    foreground[:, 2:] = True
    largest, second, third = np.zeros((3, 10, 10), bool)
    largest[:8], second[3:8, :5], third[9:, 6:] = True, True, True
    found = complementary([record(third), record(largest), record(second)], foreground)
    assert tuple(found.labels) == LABELS and found.note == ""
    others = second | third
    for mask, expected in zip(found.masks, (~others, others, largest, second), strict=True):
        np.testing.assert_array_equal(mask, expected & foreground)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_masks_leave_the_foreground_as_the_rest(count):
    foreground = np.eye(6, dtype=bool)
    largest = np.tri(6, dtype=bool)
    found = complementary([record(largest)][:count], foreground)
    assert found.note == "few_masks"
    np.testing.assert_array_equal(found.masks[0], foreground)
    assert not found.masks[1].any() and not found.masks[3].any()
    np.testing.assert_array_equal(found.masks[2], foreground & largest if count else np.zeros_like(foreground))


def test_what_lies_outside_the_foreground_changes_nothing(weights, photo):
    foreground = np.zeros(photo.shape[:2], bool)
    foreground[20:150, 30:200] = True
    other = np.where(foreground[..., None], photo, 255 - photo)
    for result in ("complementary", "masks"):
        method = loaded(weights, **ALL, result=result)
        one, two = method.segment([photo, other], [foreground, foreground])
        np.testing.assert_array_equal(one.masks, two.masks)
        assert one.masks.any() and not one.masks[:, ~foreground].any()


def test_all_masks_come_in_the_generators_order_with_their_predicted_iou(weights, photo):
    method = loaded(weights, **ALL)
    records = method.generate(photo)
    (found,) = method.segment([photo], [np.ones(photo.shape[:2], bool)])
    np.testing.assert_array_equal(found.masks, pasted(records, photo.shape[:2]))
    assert list(found.scores) == [one.score for one in records] == sorted(found.scores, reverse=True)


def test_masks_without_a_pixel_of_the_foreground_are_left_out_with_their_scores():
    foreground = np.tri(6, dtype=bool)
    masks = np.zeros((4, 6, 6), bool)
    masks[0, 0, 4:], masks[1, 2:, :3], masks[2, 1, 5], masks[3, 3:, 3:] = True, True, True, True
    records = [record(mask, score) for mask, score in zip(masks, (0.9, 0.8, 0.7, 0.6), strict=True)]
    found = inside_foreground(records, foreground)
    np.testing.assert_array_equal(found.masks, masks[[1, 3]] & foreground)
    assert found.scores == [0.8, 0.6]
    assert inside_foreground([], foreground).masks.shape == (0, 6, 6)


# Options and weights


def test_a_preset_fills_what_is_not_given():
    sam = Sam()
    assert (sam.points_per_side, sam.crop_n_layers, sam.result, sam.foreground) == (64, 2, "complementary", "rembg")
    sam = Sam(preset="library", foreground="grabcut")
    assert (sam.points_per_side, sam.crop_n_layers, sam.result, sam.foreground) == (32, 0, "masks", "grabcut")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "librari"}, "unknown preset 'librari'; did you mean 'library'"),
        ({"result": "all"}, "sam: unknown result 'all'; choose one of: complementary, masks"),
        ({"dtype": "float16"}, "sam: unknown dtype 'float16'"),
        ({"points_per_side": 0}, "sam: points_per_side must be at least 1, got 0"),
        ({"crop_n_layers": -1}, "sam: crop_n_layers must be at least 0, got -1"),
        ({"pred_iou_thresh": 1.5}, "sam: pred_iou_thresh must be between 0 and 1, got 1.5"),
        ({"stability_score_thresh": float("nan")}, "sam: stability_score_thresh must be between 0 and 1, got nan"),
        ({"crop_overlap_ratio": 1.0}, "sam: crop_overlap_ratio must be at least 0 and below 1, got 1.0"),
        ({"points_per_side": 3, "crop_n_points_downscale_factor": 2}, "leaves no point in crops of layer 2"),
        ({"preset": "library", "crop_n_points_downscale_factor": 2}, "has no effect: crop_n_layers is 0"),
        ({"foreground": "whole", "fg_alpha_min": 9}, "sam: fg_alpha_min 9 has no effect"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Sam(**options)


def test_an_official_checkpoint_gives_the_same_tensors_and_masks(weights, photo, tmp_path):
    file = write_official(weights, tmp_path / "sam_vit_tiny.pth")
    network, other = model.from_official(file), SamModel.from_pretrained(weights)
    assert network.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in other.state_dict().items())
    ours = pasted(loaded(file, **ALL).generate(photo), photo.shape[:2])
    np.testing.assert_array_equal(ours, pasted(loaded(weights, **ALL).generate(photo), photo.shape[:2]))


@pytest.mark.parametrize(
    ("width", "depth", "heads", "is_global"), [(768, 12, 12, 2), (1024, 24, 16, 5), (1280, 32, 16, 7)]
)
def test_the_published_sizes_are_read_off_the_shapes(width, depth, heads, is_global):
    blocks = list(range(is_global, depth, depth // 4))
    vision = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "global_attn_indexes": blocks,
    }
    with torch.device("meta"):
        state = SamModel(SamConfig(vision_config=vision)).state_dict()
    for pattern, official in OFFICIAL:
        state = {re.sub(pattern, official, name): tensor for name, tensor in state.items()}
    config, usual = model.official_config(state), SamConfig(vision_config=vision)
    for name in ("image_size", "patch_size", "window_size", "output_channels", "num_pos_feats", "mlp_dim", *vision):
        assert getattr(config.vision_config, name) == getattr(usual.vision_config, name), name
    for name in ("hidden_size", "mlp_dim", "num_hidden_layers", "num_attention_heads", "attention_downsample_rate"):
        assert getattr(config.mask_decoder_config, name) == getattr(usual.mask_decoder_config, name), name
    assert config.prompt_encoder_config.mask_input_channels == usual.prompt_encoder_config.mask_input_channels
    with torch.device("meta"):
        assert SamModel(config).state_dict().keys() == SamModel(usual).state_dict().keys()


def test_files_that_are_no_official_checkpoint_are_refused(weights, tmp_path):
    state = torch.load(write_official(weights, tmp_path / "sam.pth"), weights_only=True)
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "lacking.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save(Path("x"), tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("hello")
    positions = "image_encoder.pos_embed"
    changes = {  # by what reading the settings ends in
        "ValueError": {positions: torch.zeros(3)},
        "IndexError": {"prompt_encoder.no_mask_embed.weight": torch.zeros(3)},
        "ZeroDivisionError": {"image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(5, 0)},
        "AttributeError": {"epoch": 3},
        "TypeError": {7: torch.zeros(3)},
    }
    whole = torch.load(tmp_path / "sam.pth", weights_only=True)
    for name, change in changes.items():
        torch.save(whole | change, tmp_path / f"{name}.pth")
    messages = {name: "is no official" for name in ("lacking", "other", "tensor", *changes)}
    for name, message in (messages | {"code": "cannot|can be read safely", "text": "can be read safely"}).items():
        with pytest.raises(ValueError, match=f"sam: .*{name}.pth is (no|not).*") as raised:
            loaded(tmp_path / f"{name}.pth")
        assert re.search(message, str(raised.value))
        assert name not in changes or type(raised.value.__cause__).__name__ == name


def test_a_folder_of_another_network_is_refused(weights, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights / "model.safetensors")
    del tensors["mask_decoder.iou_token.weight"]
    (tmp_path / "config.json").write_bytes((weights / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="sam: .*mask_decoder.iou_token.weight"):
        loaded(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "overlap", "least"), [("float32", 1.0, 0.99), ("bfloat16", 1.0, 0.98), ("float32", 0.98, 0.99)]
)
def test_a_gpu_finds_the_masks_of_the_cpu(weights, photo, dtype, overlap, least):
    options = {"box_nms_thresh": overlap, "crop_nms_thresh": overlap, "crop_n_layers": 1}
    here, there = loaded(weights, **options), loaded(weights, "cuda", **options, dtype=dtype)
    ours, others = (pasted(method.generate(photo), photo.shape[:2]) for method in (here, there))
    assert abs(len(ours) - len(others)) <= 1 + 2 * (1 - least) * len(ours)
    assert min(best_ious(ours, others)) >= least
