"""`raypipe explain`: the page, its numbers, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from support import browsing
from support.tiny import zero_guidance as tiny
from transformers import CLIPModel

from raypipe.cli import main
from raypipe.features.clip import Clip
from raypipe.features.clip_masked import Masked, planes, squashed, token_masks
from raypipe.segmenters.zero_guidance import ZeroGuidance

NAME = "a <b>cat & \"dog's.png"
X, Y = 50, 9  # the patch in row 0, column 3 of 4 x 4

browser = pytest.fixture(scope="module")(browsing.started)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    return tiny.options(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def photo(tmp_path, monkeypatch) -> np.ndarray:
    monkeypatch.chdir(tmp_path)
    image = np.asarray(Image.fromarray(data.coffee()).resize((64, 64)))  # of the working size
    Image.fromarray(image).save(NAME)
    return image


def explain(*words: str, point: str = f"{X},{Y}", method: str = "zero_guidance") -> int:
    return main(["explain", method, "--input", NAME, "--point", point, "--output", "pages/page.html", *words])


def flags(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_every_block_is_shown_as_transformers_computes_it(options, photo, tmp_path, capsys):
    assert explain("--weights", options["weights"], "--arrays", "a.npz") == 0
    assert f"page: {tmp_path}/pages/page.html" in capsys.readouterr().out
    network = CLIPModel.from_pretrained(f"{options['weights']}/clip_model", attn_implementation="eager").eval()
    with torch.inference_mode():
        pixels = planes([squashed(photo, 64)], "cpu")
        maps = torch.stack(network.vision_model(pixels, output_attentions=True).attentions)[:, 0].mean(1)
    with np.load("a.npz") as found:
        assert found["patch"].tolist() == [0, 3] and found["maps"].dtype == np.float32
        np.testing.assert_allclose(found["maps"].reshape(3, 2, 16), maps[:, [4, 0], 1:], atol=1e-5)
        np.testing.assert_allclose(found["of_class"], maps[:, [4, 0], 0], atol=1e-5)
    page = (tmp_path / "pages" / "page.html").read_text()
    assert "a &lt;b&gt;cat &amp; &#34;dog&#39;s.png" in page and "<b>" not in page and "<script" not in page
    assert set(re.findall(r'(?:src|href)="(\w+:|#)', page)) == {"data:", "#"} and page.count("image/png") == 2 * 3
    assert page.count('class="patch"') == 3 and "caution" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)


@pytest.mark.parametrize("segment", ["point", "1"])
def test_a_segment_is_shown_as_the_method_sees_it(options, photo, segment, capsys):
    words = [*flags(options), "--t-dino", "1", "--num-parts", "4", "--no-merge", "--segment", segment]
    assert explain(*words, "--arrays", "a.npz", "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    method = ZeroGuidance(**options, t_dino=1, num_parts=4, merge=False)
    method.load("cpu")
    (found,) = method.segment([photo])
    number = int(found.masks[:, Y, X].argmax()) if segment == "point" else 1
    assert len(found.masks) == 4
    assert (result["segment"], result["label"]) == (number, found.labels[number])
    assert result["score"] == pytest.approx(found.scores[number])
    masked = Masked(Clip(method._paths["clip_model"], method="test", device="cpu"), last=2)
    tokens = token_masks(np.where(found.masks[number], 0, -1), 1, 4)
    seen = masked.seen(masked.streams([squashed(photo, 64)]), tokens, [0])
    np.testing.assert_allclose(seen.embeddings[0], found.embeddings[number], atol=1e-5)
    with np.load("a.npz") as arrays:
        np.testing.assert_array_equal(arrays["mask"], found.masks[number])
        np.testing.assert_allclose(arrays["rows"].reshape(2, 16), seen.rows[0].mean(1)[:, 1:], atol=1e-6)
        assert arrays["rows"].min() < 0 < arrays["rows"].max() and arrays["maps"].shape == (3, 2, 4, 4)


def test_the_page_opens_without_network(options, photo, tmp_path, browser):
    assert explain(*flags(options), "--segment", "0") == 0
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(address := (tmp_path / "pages" / "page.html").as_uri())
    assert said == [address] and page.locator(".maps svg").count() == 2 * 3 + 2
    assert page.locator("h1").inner_text() == NAME and "block-list" in page.locator(".caution").inner_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--point", "64,9"], "--point 64,9 is outside of the image of 64 x 64 px: X is from 0 to 63"),
        (["--point", "a,9"], "--point must be X,Y in whole pixels, such as 120,80, got 'a,9'"),
        (["--segment", "4"], "zero_guidance: there is no segment 4; the image has 0 '"),
        (["--segment", "-1"], "--segment must be a number from 0 on, or point, got '-1'"),
        (["--segment", "0", "--mask-last-layers", "0"], "zero_guidance: a segment has nothing to show without masked"),
        (["--tau-merge", "0.7"], "zero_guidance: tau_merge has no effect without a segment; add --segment point"),
        (["--arrays", "a.txt"], "--arrays must name a .npz file, got 'a.txt'"),
        (["--output", "."], "is a folder; name a file in it"),
        (["--input", "absent.png"], "absent.png: fetch: missing"),
        (["--input", "torn.png"], "torn.png: decode: truncated"),
    ],
)
def test_what_cannot_be_explained_is_said_in_a_line(options, photo, tmp_path, words, expected, capsys):
    (tmp_path / "torn.png").write_bytes((tmp_path / NAME).read_bytes()[:900])
    chosen = {"--point": f"{X},{Y}", "--input": NAME, "--output": "page.html"} | dict(
        zip(*[iter(words)] * 2, strict=True)
    )
    needed = {"weights": options["weights"]} if "--segment" not in words else options
    given = {name: value for name, value in needed.items() if f"--{name.replace('_', '-')}" not in words}
    assert main(["explain", "zero_guidance", *flags(given), *[word for pair in chosen.items() for word in pair]]) == 2
    assert expected in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_a_method_without_attention_is_told(photo, capsys):
    assert explain(method="kmeans") == 2
    assert "explain: kmeans has no attention to show; zero_guidance has" in capsys.readouterr().err
    assert main(["explain"]) == 2
    assert "Methods:\n  zero_guidance\n\n" in capsys.readouterr().out
