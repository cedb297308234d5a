"""`raypipe explain`: where a method's network looks in one image, from one of its points, as a page and as arrays."""

from __future__ import annotations

import base64
import io
import os
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import numpy as np

from raypipe import segmenters
from raypipe.images import decode, encode_png
from raypipe.pages import html
from raypipe.pictures.overlay import jpeg, overlay, resized, scaled
from raypipe.runtime import cores
from raypipe.storage import Location, put_at, read_bytes
from raypipe.types import BadImage, Segmenter

if TYPE_CHECKING:
    from raypipe.segmenters.zero_guidance.attention import Looks

MAX_BYTES, MAX_PIXELS = 500_000_000, 100_000_000  # the defaults of `label`
SIDE = 480  # px of the photograph's longer side on the page
STRIP = 4  # a photograph is drawn at most this many times as long as wide, a strip squeezed to that
HOT, WARM, COLD = (255, 235, 120), (214, 30, 30), (40, 90, 220)  # RGB of maps: the most, some, below zero
SHOWN = 200  # characters of a setting


@dataclass(frozen=True)
class Explain:
    """Where the network of a method looks in an image, block by block: one HTML page. Of zero_guidance."""

    input: str  # the image: a path or a URI
    output: str  # the page: a path or a URI
    point: str  # X,Y in pixels of the upright image: what its patch looks at is shown
    # also what the embedding of a segment is made of: its number (0 is the largest), or point, for the one there
    segment: str | None = None
    arrays: str | None = None  # also write the numbers, to this .npz: a path or a URI
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where networks run


@dataclass(frozen=True)
class Result:
    """What was written."""

    page: str
    blocks: int
    patch: tuple[int, int]  # row and column of the point's
    arrays: str | None
    segment: int | None  # the number of the chosen one
    label: str | None
    score: float | None

    def text(self) -> str:
        """Where the page is."""
        lines = [f"{self.blocks} blocks, the point is in the patch in row {self.patch[0]}, column {self.patch[1]}"]
        if self.segment is not None:
            lines.append(f"segment {self.segment}: {self.label!r} ({self.score:.3f})")
        lines += [f"arrays: {self.arrays}"] if self.arrays else []
        return "\n".join([*lines, f"page: {self.page}"])


def methods() -> list[str]:
    """Those that have something to show."""
    return [name for name in segmenters.names() if hasattr(segmenters.find(name), "explain")]


def explain(options: Explain, method: Segmenter) -> Result:
    """Write the page. Raises ValueError for what cannot be explained, FileNotFoundError for weights that are absent."""
    if not hasattr(method, "explain"):
        raise ValueError(f"explain: {method.name} has no attention to show; {', '.join(methods())} has")
    if options.arrays and not options.arrays.endswith(".npz"):
        raise ValueError(f"--arrays must name a .npz file, got {options.arrays!r}")
    segment = _segment(options.segment)
    try:
        image = decode(read_bytes(options.input, max_bytes=MAX_BYTES), max_pixels=MAX_PIXELS)
        point = _point(options.point, image.shape[:2])
        device = cores.device_here(options.device, gpus=method.gpus)
        looks = method.explain(image, point, segment=segment, device=device)
    except BadImage as error:
        raise ValueError(f"explain: {Location(options.input)}: {error}") from error
    arrays = options.arrays and put_at(options.arrays, _arrays(looks, point), option="--arrays")
    page = put_at(options.output, _page(options, method, image, point, looks).encode(), option="--output")
    chosen = (looks.chosen.number, looks.chosen.name, looks.chosen.score) if looks.chosen else (None, None, None)
    return Result(page, len(looks.maps), looks.patch, arrays, *chosen)


def _point(text: str, size: tuple[int, int]) -> tuple[int, int]:
    """X and Y. size: of the image."""
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text, re.ASCII)
    if not found:
        raise ValueError(f"--point must be X,Y in whole pixels, such as 120,80, got {text!r}")
    x, y = map(int, found.groups())
    height, width = size
    if not (x < width and y < height):
        text = f"is outside of the image of {width} x {height} px: X is from 0 to {width - 1}, Y from 0 to {height - 1}"
        raise ValueError(f"--point {x},{y} {text}")
    return x, y


def _segment(text: str | None) -> int | str | None:
    if text is None or text == "point":
        return text
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise ValueError(f"--segment must be a number from 0 on, or point, got {text!r}")
    return int(text)


def _arrays(looks: Looks, point: tuple[int, int]) -> bytes:
    """All that was found, as .npz."""
    named = {"maps": looks.maps, "of_class": looks.of_class, "patch": looks.patch, "point": point}
    if looks.chosen:
        named |= {"rows": looks.chosen.rows, "mask": looks.chosen.mask, "label": looks.chosen.name}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **named)
    return buffer.getvalue()


def _page(options: Explain, method: Segmenter, image: np.ndarray, point: tuple[int, int], looks: Looks) -> str:
    blocks, grid = len(looks.maps), looks.maps.shape[2]
    size, chosen = scaled(image.shape[:2], SIDE), looks.chosen
    photo = resized(image, size)
    lines = [
        (name, [_cell(plane, share) for plane, share in zip(looks.maps[:, i], looks.of_class[:, i], strict=True)])
        for i, name in enumerate(("the point's patch", "the class token"))
    ]
    if chosen:
        cells = [None] * (blocks - len(chosen.rows)) + [_cell(plane) for plane in chosen.rows]
        lines.append((f"segment {chosen.number}: {chosen.name}", cells))
    asked = ("clip_model", "dtype") if chosen is None else tuple(asdict(method))
    return html.render(
        "explain.html.j2",
        None,
        title=os.path.basename(Location(options.input)),
        place=str(Location(options.input)),
        photo=jpeg(photo, 85),
        segment=chosen and jpeg(overlay(photo, [chosen.mask]), 85),
        chosen=chosen,
        size=[min(side, STRIP * min(size)) for side in size],
        at=[(place + 0.5) / side for place, side in zip(point, image.shape[1::-1], strict=True)],
        point=point,
        patch=looks.patch,
        grid=grid,
        lines=lines,
        blocks=blocks,
        caution=method.caution,
        method=method.name,
        settings={name: str(getattr(method, name))[:SHOWN] for name in asked},
        version=version("raypipe"),
    )


def _cell(plane: np.ndarray, share: float | None = None) -> dict:
    """A map as a picture, scaled by its own largest value. share: what the class token has beside it."""
    largest = np.abs(plane).max()
    return {"picture": _heat(plane / max(largest, 1e-30)), "largest": float(largest), "share": share}


def _heat(values: np.ndarray) -> str:
    """A data URI of a PNG that lies over the photograph. values: (h, w) in [-1, 1]."""
    strength = np.abs(values)[..., None]
    above = np.array(WARM) + (np.array(HOT) - WARM) * strength**2
    colours = np.where(values[..., None] < 0, np.array(COLD), above)
    pixels = np.concatenate([colours, 230 * strength**0.6], 2).round().astype(np.uint8)
    return f"data:image/png;base64,{base64.b64encode(encode_png(pixels)).decode()}"
