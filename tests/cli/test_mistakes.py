"""What people type wrong: answered before Ray starts, without a traceback, with the value and what to write instead."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
from PIL import Image
from support.faulty import GOOD, write_images

from raypipe.cli.verbs import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photographs, labels, lists, config files and a run, as a user has them."""
    root = tmp_path_factory.mktemp("place")
    write_images(root / "photos", [GOOD] * 3)
    (root / "with text").mkdir()
    (root / "with text/notes.txt").write_text("no picture\n")
    for name in ("empty", "labels", "otherlabels"):
        (root / name).mkdir()
    for photo in (root / "photos").iterdir():
        size = Image.open(photo).size
        Image.new("L", size, 0).save(root / "labels" / f"{photo.stem}.png")
        other = Image.new("L", (size[0] + 3, size[1]), 0)
        other.paste(255, (0, 0, 9, 9))
        other.save(root / "otherlabels" / f"{photo.stem}.png")
    (root / "file").write_text("x")
    (root / "list.csv").write_text("path,who\nphotos/a.jpg,anna\n")
    (root / "unknown.yaml").write_text("forground: grabcut\n")
    (root / "syntax.yaml").write_text("k: [2\n")
    (root / "type.yaml").write_text("k: three\n")
    (root / "items.yaml").write_text("- k\n- 3\n")
    (root / "watershed.yaml").write_text("blur: 5\n")
    (root / "page.onnx").write_text("<!doctype html>")
    here = ["--input", str(root / "photos"), "--output", str(root / "run"), "--foreground", "whole", "--local"]
    assert main(["label", "kmeans", *here]) == 0
    (root / "nested.yaml").write_bytes((root / "run/run.json").read_bytes())
    return root


LABEL = "label kmeans --input photos --output new --foreground grabcut"
SWEEP = "sweep kmeans --input photos --labels labels --output swept --foreground grabcut"
SALIENCY = "evaluate run --labels labels --task saliency"
DATA_SET = "sweep kmeans --dataset ecssd --root photos --output swept --foreground grabcut --over k=2,3"
MISTAKES = [  # name, what is typed as in a shell, exit code, what the answer must say
    ("verb", "lable kmeans", 2, ["'lable'", "did you mean 'label'"]),
    ("method for verb", "kmeans --input photos", 2, ["'kmeans'", "raypipe label kmeans --input photos"]),
    ("method", "label kmean --input photos --output new", 2, ["'kmean'", "did you mean 'kmeans'"]),
    ("method last", "label --input photos --output new kmeans", 2, ["label kmeans --input photos --output new"]),
    ("option", LABEL + " --forground whole", 2, ["--forground", "--foreground"]),
    ("option of another method", LABEL + " --blur 3", 2, ["--blur", "watershed"]),
    ("option of a refiner", LABEL + " --refine-radius 4", 2, ["--refine-radius", "--refine guided"]),
    ("option missing", "label kmeans --input photos", 2, ["--output"]),
    ("value missing", "label kmeans --output new --input", 2, ["--input"]),
    ("words without an option", "label kmeans photos new", 2, ["'photos'", "--input photos"]),
    ("type", LABEL + " --k two", 2, ["--k", "a whole number", "'two'"]),
    ("fraction for a count", LABEL + " --limit 1.5", 2, ["--limit", "a whole number", "'1.5'"]),
    ("unit", LABEL + " --timeout 5min", 2, ["--timeout", "a number", "'5min'"]),
    ("limit 0", LABEL + " --limit 0", 2, ["--limit must be positive", "0"]),
    ("limit -1", LABEL + " --limit -1", 2, ["--limit must be positive", "-1"]),
    ("timeout 0", LABEL + " --timeout 0", 2, ["--timeout must be positive"]),
    ("share above 1", LABEL + " --max-bad-fraction 5", 2, ["--max-bad-fraction must be in 0..1", "5"]),
    ("too many actors", LABEL + " --actors 10000", 2, ["--actors 10000", "at most"]),
    ("k 1", LABEL + " --k 1", 2, ["k must be between 2 and 255", "1"]),
    ("k 100000", LABEL + " --k 100000", 2, ["k must be between 2 and 255", "100000"]),
    ("threshold of binary masks", LABEL + " --threshold 0.5", 2, ["--threshold", "add --refine "]),
    ("device word", LABEL + " --device gpu", 2, ["--device", "gpu", "cuda"]),
    ("device of a CPU method", LABEL + " --device cuda", 2, ["--device cuda", "kmeans runs on the CPU only"]),
    ("no GPU", LABEL.replace("kmeans", "gloper") + " --device cuda", 2, ["--device cuda", "--device cpu does without"]),
    ("no input folder", "label kmeans --input fotos --output new", 2, ["fotos does not exist"]),
    ("empty folder", "label kmeans --input empty --output new", 2, ["no images", "empty"]),
    ("no images", "label kmeans --input 'with text' --output new", 2, ["no images", "with text", "1 .txt"]),
    ("output in the input", "label kmeans --input photos --output photos/run", 2, ["photos/run", "inside the input"]),
    ("output is a file", "label kmeans --input photos --output file", 2, ["file", "choose a folder"]),
    ("spread pattern", "label kmeans --input photos/a.jpg photos/b.jpg --output new", 2, ["photos/b.jpg", "quote"]),
    ("path with blanks", "label kmeans --input photos/Sued Afrika --output new", 2, ["'Afrika'", "--input", "quote"]),
    ("Windows path", r"label kmeans --input 'C:\Users\anna\photos' --output new", 2, ["Windows", "/mnt/c/Users/anna"]),
    ("Windows output", r"label kmeans --input photos --output 'D:\runs'", 2, ["Windows", "/mnt/d/runs"]),
    ("home that is not there", "label kmeans --input ~/no/such/photos --output new", 2, ["/no/such/photos"]),
    ("column", "label kmeans --input list.csv --column image --output new", 2, ["'image'", "'path'", "'who'"]),
    ("foreground", "label kmeans --input photos --output new --foreground GrabCut", 2, ["'GrabCut'", "grabcut"]),
    ("given without a folder", "label kmeans --input photos --output new --foreground given:", 2, ["given:DIR"]),
    (
        "given nowhere",
        "label kmeans --input photos --output new --foreground given:nope",
        2,
        ["nope", "does not exist"],
    ),
    ("run nowhere", "label kmeans --input photos --output new --foreground run:nope", 2, ["nope"]),
    (
        "no internet",
        "label kmeans --input photos --output new",
        2,
        ["u2net.onnx", "--foreground grabcut", "raypipe weights rembg --to DIR", "empty/u2net.onnx"],
    ),
    ("rembg model", "label kmeans --input photos --output new --foreground rembg:u2nett", 2, ["did you mean 'u2net'"]),
    ("rembg file", "label kmeans --input photos --output new --foreground rembg:no.onnx", 2, ["no.onnx", "grabcut"]),
    ("no network", "label kmeans --input photos --output new --foreground rembg:page.onnx", 2, ["page.onnx", "<!doc"]),
    ("weights empty", LABEL.replace("kmeans", "clipseg") + " --weights empty", 2, ["empty holds no weights"]),
    ("weights nowhere", LABEL.replace("kmeans", "clipseg") + " --weights /no/w", 2, ["'/no/w'", "neither a folder"]),
    ("refiner", LABEL + " --refine gf", 2, ["'gf'", "guided"]),
    ("config missing", LABEL + " --config nope.yaml", 2, ["nope.yaml", "No such file"]),
    ("config key", LABEL + " --config unknown.yaml", 2, ["unknown.yaml", "'forground'", "did you mean 'foreground'"]),
    ("config syntax", LABEL + " --config syntax.yaml", 2, ["syntax.yaml", "not valid YAML", "line"]),
    ("config type", LABEL + " --config type.yaml", 2, ["type.yaml", "'k'", "a whole number", "'three'"]),
    ("config list", LABEL + " --config items.yaml", 2, ["items.yaml", "expected flat lines", "a list"]),
    ("config of a run", LABEL + " --config nested.yaml", 2, ["nested.yaml", "'settings'", "--print-config"]),
    ("config of another method", LABEL + " --config watershed.yaml", 2, ["watershed.yaml", "'blur'", "of watershed"]),
    ("other settings", "label kmeans --input photos --output run --foreground whole --k 3", 4, ["k: 2 there, 3 now"]),
    ("other method", "label watershed --input photos --output run --foreground whole", 4, ["kmeans", "watershed"]),
    ("labels missing", "evaluate run --labels lables", 2, ["lables", "does not exist"]),
    ("labels of another size", "evaluate run --labels otherlabels", 2, ["another size"]),
    ("labels all empty", "evaluate run --labels labels", 2, ["no pixel of any of the labels", "--label-kind"]),
    ("labels unmatched", "evaluate run --labels 'with text'", 2, ["with text"]),
    ("no labels at all", "evaluate run", 2, ["--labels", "--dataset NAME --root DIR"]),
    ("labels and a data set", "evaluate run --labels labels --dataset ecssd --root .", 2, ["--labels", "ecssd"]),
    ("data set", "evaluate run --dataset ecsd --root .", 2, ["'ecsd'", "did you mean 'ecssd'"]),
    ("data set without a root", "evaluate run --dataset ecssd", 2, ["--dataset ecssd", "--root"]),
    ("root without a data set", "evaluate run --labels labels --root .", 2, ["--root", "--dataset", "ecssd"]),
    ("root without its folders", "evaluate run --dataset ecssd --root .", 2, ["ECSSD/images", "ECSSD/img", "ECSSD/gt"]),
    ("root nowhere", "evaluate run --dataset ecssd --root nope", 2, ["nope does not exist"]),
    ("split of none", "evaluate run --dataset ecssd --root . --split val", 2, ["'val'", "ecssd has no splits"]),
    ("task", "evaluate run --labels labels --task salience", 2, ["'salience'", "did you mean 'saliency'"]),
    ("option of another task", "evaluate run --labels labels --box-rule largest_area", 2, ["--box-rule"]),
    ("training's protocol", SALIENCY + " --protocol crop320", 2, ["crop320", "train sempart --validate"]),
    ("protocol", SALIENCY + " --protocol crop", 2, ["--protocol", "full", "crop320"]),
    ("boxes in a folder of masks", "evaluate run --labels labels --task boxes", 2, ["labels"]),
    ("run missing", "report nope", 2, ["nope"]),
    ("run is photos", "verify photos", 2, ["photos", "raypipe run"]),
    ("format", "export run --format cocoa", 2, ["cocoa", "coco"]),
    ("format missing", "export run", 2, ["--format"]),
    ("where column", "export run --format coco --where 'shar > 0.01'", 2, ['"shar"', "share"]),
    ("where syntax", "export run --format coco --where 'share >> and'", 2, ["syntax error", "and"]),
    ("where quotes", """export run --format coco --where 'label = "pattern"'""", 2, ["single quotes"]),
    ("join nowhere", "export run --format coco --where 'share > 0' --join nope.parquet", 2, ["--join", "nope.parquet"]),
    ("over without values", SWEEP + " --over k 2,3", 2, ["'k'", "NAME=VALUES"]),
    ("over a range without step", SWEEP + " --over eps=2:5", 2, ["'2:5'", "start:stop:step"]),
    ("over an unknown field", SWEEP + " --over kk=2,3", 2, ["'kk'", "did you mean 'k'"]),
    ("sweep's labels of another size", SWEEP.replace("s labels", "s otherlabels") + " --over k=2,3", 2, ["size"]),
    ("sweep's labels all empty", SWEEP + " --over k=2,3", 2, ["no pixel of any of the labels"]),
    ("over and given", SWEEP + " --k 3 --over k=2,3", 2, ["k is both given and swept"]),
    ("sweep's labels missing", SWEEP.replace("labels labels", "labels nope") + " --over k=2,3", 2, ["nope"]),
    ("sweep without labels", SWEEP.replace("--labels labels", "") + " --over k=2,3", 2, ["--labels", "--dataset NAME"]),
    ("sweep without images", SWEEP.replace("--input photos", "") + " --over k=2,3", 2, ["--input", "--dataset NAME"]),
    ("sweep of no images", SWEEP + " --over k=2,3 --limit 0", 2, ["--limit must be positive", "0"]),
    ("sweep's data set and labels", SWEEP + " --over k=2,3 --dataset ecssd --root .", 2, ["--labels", "leave one out"]),
    ("split of labels", SWEEP + " --over k=2,3 --split val", 2, ["--split has no effect without --dataset"]),
    ("data set to sweep", DATA_SET.replace("ecssd", "ecsd"), 2, ["'ecsd'", "did you mean 'ecssd'"]),
    ("data set that is not there", DATA_SET, 2, ["ecssd is not in", "ECSSD/images", "ECSSD/ground_truth_mask"]),
    ("data set without a root", DATA_SET.replace("--root photos", ""), 2, ["--dataset ecssd", "add --root"]),
    ("root nowhere", DATA_SET.replace("photos", "nope"), 2, ["nope", "does not exist"]),
    ("metric", SWEEP + " --over k=2,3 --metric diec_best", 2, ["'diec_best'", "dice_fixed, dice_best"]),
    ("one run to agree", "agree run", 2, ["two or more", "run"]),
    ("weights of nothing", "weights kmeans --to w", 2, ["kmeans needs no weights"]),
    ("method to list", "methods kmean", 2, ["'kmean'", "did you mean 'kmeans'"]),
]


@pytest.mark.parametrize(("typed", "code", "words"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_answered_before_ray_starts(typed, code, words, place, monkeypatch, capsys):
    if "gloper" in typed and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(place)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("U2NET_HOME", str(place / "empty"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there: no internet
    monkeypatch.setenv("NO_PROXY", "")
    try:
        found = main(shlex.split(typed))
    except SystemExit as end:
        found = end.code
    text = re.sub(r"[\s│]+", " ", "".join(capsys.readouterr()))
    assert found == code, text
    assert "Traceback" not in text and all(word in text for word in words), text
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
    assert not list(place.glob("new/**/*.parquet"))


def test_stdout_that_nobody_reads_is_no_error(place):
    for words in (["--help"], ["label", "kmeans", "--help"], ["methods"], ["report", "run"]):
        command = [sys.executable, "-m", "raypipe", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=place) as process:
            process.stdout.close()
            assert process.stderr.read() == b"" and process.wait() == 141, words
