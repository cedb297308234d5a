"""The layers of a page's pictures: masks in their colours, contours, and how large it all gets."""

import io
from hashlib import sha256

import numpy as np
from PIL import Image
from support.browsing import open_uri
from support.shares import row

from raypipe import masks
from raypipe.pictures.layers import draw, draw_layers
from raypipe.pictures.overlay import COLOURS


def test_layers_show_each_mask_in_its_colour_and_the_small_one_on_top():
    large, small = np.zeros((2, 40, 60), bool)
    large[:, :50], small[10:30, 10:30] = True, True
    found = {"segments": masks.encode_segments(np.stack([large, small])), "foreground": masks.encode_rle(large)}
    layers = draw_layers(found, (40, 60))
    fill, contour = (np.asarray(open_uri(uri).convert("RGBA")) for uri in layers)
    assert tuple(fill[20, 20]) == (*COLOURS[1], 255) and tuple(fill[5, 5]) == (*COLOURS[0], 255)
    assert tuple(fill[20, 55]) == (0, 0, 0, 255)  # outside the foreground
    assert tuple(contour[10, 20]) == (*COLOURS[1], 255) and contour[20, 20, 3] == 0


def test_a_picture_shrinks_until_it_fits_its_bytes():
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
    content = encoded(noise)
    found = row("a.png", height=400, width=600, sha256=sha256(content).hexdigest())
    found["segments"] = masks.encode_segments(noise[None, :, :, 0] > 127)
    large = draw(content, [found], side=480, max_bytes=10**9)
    small = draw(content, [found], side=480, max_bytes=60_000)
    assert (large.width, large.height) == (480, 320) and small.width < 480 and small.nbytes <= 60_000


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
