""".github/SECURITY.md says what the code does: its limits are the defaults, and the tests that it names are there."""

import re
from pathlib import Path

from raypipe import networks
from raypipe.cli import config
from raypipe.pipeline import workers
from raypipe.pipeline.job import Label
from raypipe.types import Segmenter

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / ".github/SECURITY.md").read_text()


def test_the_limits_are_the_defaults():
    stated = dict(re.findall(r"^\| ((?!limit)[^|]+) \| (\d[^|]*) \|$", PAGE, re.MULTILINE))
    assert {name: re.match(r"\d+(,\d{3})*( million| MB)?", value)[0] for name, value in stated.items()} == {
        "pixels of an image": f"{Label.max_pixels // 10**6} million",
        "bytes of an image file": f"{Label.max_bytes // 10**6} MB",
        "seconds of an image in its method": f"{Segmenter.timeout:.0f}",
        "tries of an image that takes its process along": f"{workers.MAX_TRIES}",
        "layers of a network": f"{networks.MAX_LAYERS:,}",
        "bytes of a config file": f"{config.MOST_BYTES >> 20} MB",
    }


def test_what_the_page_names_is_there():
    names = re.findall(r"`((?:tests|jobs|raypipe)/[\w/]+\.\w+)`", PAGE)
    assert len(names) > 8 and all((ROOT / name).is_file() for name in names)
    options = {f"--{name.replace('_', '-')}" for name in Label.__dataclass_fields__} | {"--config", "--where"}
    assert {"--max-pixels", "--allow-private"} <= set(re.findall(r"`(--[a-z-]+)`", PAGE)) <= options
