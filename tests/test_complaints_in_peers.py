"""What `test_complaints.py` shows to be absent here, shown in the tools themselves, as far as they are installed.

rembg and Ray come with raypipe; for the others, `pip install autodistill roboflow scikit-learn datumaro img2dataset
label-studio-sdk 'rembg[cli]' segment-anything`. What a tool has mended since is not here: rembg the orientation
(danielgatis/rembg#441), CVAT masks that overlap (cvat-ai/cvat#751), Datumaro masks with holes, FiftyOne orientation
(voxel51/fiftyone#3824) and names of repeated exports (voxel51/fiftyone#6364), autodistill the error of a second run
(autodistill/autodistill#58), img2dataset to go on where it was stopped (rom1504/img2dataset#167), Ray Data pictures of
several sizes in a batch, and writers that overwrite each other (ray-project/ray#55118). CVAT itself, a server, is not
asked, nor FiftyOne, which starts a database, nor segment-anything's script, which its package lacks.
"""

import functools
import http.server
import importlib.util
import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image
from support.tiny.rembg import write_network


def needs(name: str, package: str):
    """Skips a test where a module is not installed, with the package to get."""
    absent = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(absent, reason=f"the peer is not installed: pip install {package}")


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(path)
    return path


# rembg


@pytest.fixture
def small(tmp_path, monkeypatch) -> str:
    """The name of a model of rembg that is a tiny network here."""
    (tmp_path / "home").mkdir()
    write_network(tmp_path / "home/u2netp.onnx")
    monkeypatch.setenv("U2NET_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODEL_CHECKSUM_DISABLED", "1")
    return "u2netp"


def test_rembg_cannot_be_imported_without_what_makes_that_slow():
    """danielgatis/rembg#169, pymatting/pymatting#84: numba compiles the mattes, most of a minute the first time."""
    code = "import sys; sys.modules.update(numba=None)\nimport rembg"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "import of numba halted" in done.stderr


def test_what_rembg_writes_is_much_larger_than_the_photograph(small):
    """danielgatis/rembg#391."""
    from rembg import new_session, remove

    Image.fromarray(skimage.data.astronaut()).save(photo := io.BytesIO(), "JPEG", quality=90)
    cut = remove(photo.getvalue(), session=new_session(small, providers=["CPUExecutionProvider"]))
    assert len(cut) > 3 * len(photo.getvalue())


@needs("filetype", "'rembg[cli]'")
@pytest.mark.parametrize(("output", "written"), [("out", {"1.png"}), ("photos", set())])
def test_rembg_makes_one_file_of_three_pictures_and_none_beside_them(small, output, written, tmp_path):
    """As in cvat-ai/cvat#7523 and #8076; danielgatis/rembg#94: what has the name of an output is left out, untold."""
    pytest.importorskip("watchdog", reason="the peer is not installed: pip install 'rembg[cli]'")
    from click.testing import CliRunner
    from rembg.commands.p_command import p_command

    photos = {key: picture(tmp_path / "photos" / key).read_bytes() for key in ("1.png", "2.png", "1.jpg", "a/1.png")}
    (tmp_path / "photos/2.png").write_bytes(photos.pop("2.png")[:40])  # cut short
    done = CliRunner().invoke(p_command, ["-m", small, str(tmp_path / "photos"), str(tmp_path / output)])
    assert done.exit_code == 0
    found = {str(path.relative_to(tmp_path / output)) for path in (tmp_path / output).rglob("*") if path.is_file()}
    assert found - (photos.keys() | {"2.png"} if output == "photos" else set()) == written


# segment-anything


@pytest.fixture
def sam():
    """The official network, small and of random weights."""
    modeling = pytest.importorskip(
        "segment_anything.modeling", reason="the peer is not installed: pip install segment-anything"
    )
    decoder = modeling.TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=32, num_heads=8)
    return modeling.Sam(
        modeling.ImageEncoderViT(
            depth=1, embed_dim=16, img_size=64, num_heads=2, out_chans=32, use_rel_pos=True, global_attn_indexes=[0]
        ),
        modeling.PromptEncoder(
            embed_dim=32, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=8
        ),
        modeling.MaskDecoder(num_multimask_outputs=3, transformer=decoder, transformer_dim=32),
    ).eval()  # fmt: skip


def test_segment_anything_breaks_where_it_finds_nothing(sam):
    """facebookresearch/segment-anything#614."""
    from segment_anything import SamAutomaticMaskGenerator

    generator = SamAutomaticMaskGenerator(sam, points_per_side=3, crop_n_layers=1, pred_iou_thresh=1e6)
    with pytest.raises(IndexError):
        generator.generate(skimage.data.astronaut()[:60, :60].copy())


def test_segment_anything_breaks_at_a_transparent_picture_with_words_about_its_size(sam):
    """facebookresearch/segment-anything#413."""
    from segment_anything import SamPredictor

    with pytest.raises(AssertionError, match="long side"):
        SamPredictor(sam).set_image(np.zeros((40, 60, 4), np.uint8))


# autodistill


@pytest.fixture
def whole():
    """A method of autodistill: one object, the whole picture."""
    detection = pytest.importorskip(
        "autodistill.detection", reason="the peer is not installed: pip install autodistill"
    )
    import supervision

    class Whole(detection.DetectionBaseModel):
        def predict(self, input):
            box = np.array([[0, 0, input.shape[1], input.shape[0]]], float)
            return supervision.Detections(box, class_id=np.array([0]), confidence=np.array([1.0]))

    return Whole(detection.CaptionOntology({"object": "object"}))


def test_autodistill_ends_at_a_file_that_cannot_be_read(whole, tmp_path):
    """autodistill/autodistill#101."""
    picture(tmp_path / "in/a.jpg")
    (tmp_path / "in/b.jpg").touch()
    with pytest.raises(AttributeError):
        whole.label(str(tmp_path / "in"), output_folder=str(tmp_path / "out"))


def test_autodistill_labels_nothing_of_another_ending_and_reports_success(whole, tmp_path, capsys):
    """autodistill/autodistill#181, #90."""
    picture(tmp_path / "in/a.JPG")
    assert len(whole.label(str(tmp_path / "in"), output_folder=str(tmp_path / "out"))) == 0
    assert "Labeled dataset created" in capsys.readouterr().out


def test_autodistill_mixes_what_it_learns_from_with_what_it_validates_on_in_a_second_run(whole, tmp_path, monkeypatch):
    """As in autodistill/autodistill#148 and #49: it moves pictures about in its output; what is there stays there."""
    for name in "abcdef":
        picture(tmp_path / f"in/{name}.jpg")
    for turn in (1, -1):  # it splits them by chance: here the second run in the other order
        monkeypatch.setattr("random.shuffle", lambda files, turn=turn: files.sort(reverse=turn < 0))
        whole.label(str(tmp_path / "in"), output_folder=str(tmp_path / "out"))
    learns, validates = ({file.name for file in (tmp_path / f"out/{of}/images").iterdir()} for of in ("train", "valid"))
    assert learns & validates


# CVAT: what reads its files


@needs("datumaro", "datumaro")
def test_datumaro_refuses_two_pictures_of_one_name_with_other_endings():
    """cvat-ai/cvat#7523: CVAT names an item without its ending."""
    from datumaro.components.dataset import Dataset
    from datumaro.components.dataset_base import DatasetItem
    from datumaro.components.errors import RepeatedItemError
    from datumaro.components.media import Image as Picture

    items = [DatasetItem("1", media=Picture.from_file(path=f"1.{end}")) for end in ("png", "jpg")]
    with pytest.raises(RepeatedItemError):
        len(Dataset.from_iterable(items))


# Label Studio: what writes its exports

BRUSHES = """<View><Image name="i" value="$image"/>
<BrushLabels name="b" toName="i"><Label value="a"/></BrushLabels></View>"""


@needs("label_studio_sdk", "label-studio-sdk")
def test_label_studios_run_lengths_are_of_four_channels_and_its_coco_has_no_brushes_or_fills_their_holes(tmp_path):
    """HumanSignal/label-studio#382, #5899, #7737: of each part it makes an object, without its holes."""
    from label_studio_sdk.converter import Converter, brush

    mask = np.zeros((40, 60), np.uint8)
    mask[5:30, 5:30], mask[12:20, 12:20], mask[33:38, 40:55] = 255, 0, 255
    runs = brush.mask2rle(mask)
    assert len(brush.decode_rle(runs)) == 4 * mask.size
    region = {"id": "r", "from_name": "b", "to_name": "i", "type": "brushlabels", "original_width": 60}
    region |= {"original_height": 40, "value": {"format": "rle", "rle": runs, "brushlabels": ["a"]}}
    annotation = {"id": 1, "completed_by": 1, "result": [region]}
    task = {"id": 1, "data": {"image": str(picture(tmp_path / "1.png"))}, "annotations": [annotation]}
    (tmp_path / "tasks.json").write_text(json.dumps([task]))
    drawn = {}
    for form in ("COCO", "BRUSH_TO_COCO"):
        converter = Converter(BRUSHES, project_dir=None, download_resources=False)
        converter.convert(str(tmp_path / "tasks.json"), str(tmp_path / form), form, is_dir=False)
        (file,) = (tmp_path / form).glob("*.json")
        drawn[form] = [each["segmentation"] for each in json.loads(file.read_text())["annotations"]]
    assert drawn["COCO"] == [] and [len(polygons) for polygons in drawn["BRUSH_TO_COCO"]] == [1, 1]


# img2dataset


@pytest.mark.slow
@needs("img2dataset", "img2dataset")
def test_img2dataset_never_tries_again_and_does_not_see_that_its_list_changed(tmp_path):
    """rom1504/img2dataset#333, #452 and #438."""
    for name in "ac":
        picture(tmp_path / f"web/{name}.jpg")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = {"url_list": str(tmp_path / "list.txt"), "output_folder": str(tmp_path / "out"), "resize_mode": "no"}
    options |= {"processes_count": 1, "thread_count": 1, "min_image_size": 0, "incremental_mode": "incremental"}
    code = f"from img2dataset import download\nif __name__ == '__main__': download(**{options!r})"
    (tmp_path / "job.py").write_text(code)
    for names in ("ab", "ab", "cab"):  # b is missing, then there; c is new
        addresses = (f"http://127.0.0.1:{server.server_port}/{name}.jpg" for name in names)
        (tmp_path / "list.txt").write_text("\n".join(addresses))
        subprocess.run([sys.executable, tmp_path / "job.py"], check=True, capture_output=True)
        assert len(list((tmp_path / "out").rglob("*.jpg"))) == 1
        picture(tmp_path / "web/b.jpg")
    server.shutdown()
    server.server_close()


# Ray Data

JOBS = """
import ray, sys
from ray.data import range as rows, read_images
ray.init(num_cpus=1, include_dashboard=False)
def work(row):
    if row["id"] == 7:
        raise RuntimeError("this image is not liked")
    return row
for job in (lambda: rows(10).map(work).take_all(), lambda: read_images(sys.argv[1]).take_all()):
    try:
        job()
    except ray.exceptions.RayTaskError as error:
        print("ended by", "a row" if "not liked" in str(error) else "a file" if "load image" in str(error) else error)
"""


@pytest.mark.slow
def test_one_bad_row_or_file_ends_a_job_of_ray_data(tmp_path):
    """ray-project/ray#41213; as in autodistill/autodistill#101. With `max_errored_blocks` a whole block is lost."""
    picture(tmp_path / "good.png")
    (tmp_path / "broken.png").touch()
    done = subprocess.run([sys.executable, "-c", JOBS, str(tmp_path)], capture_output=True, text=True)
    assert {"ended by a row", "ended by a file"} <= set(done.stdout.splitlines()), done.stderr
