"""Images that show the same: by their bytes, by a perceptual hash, by the direction of their embeddings."""

from __future__ import annotations

from functools import cache

import numpy as np

MOST_BITS = 4  # of 64 in which the hashes of near duplicates differ
LEAST_COSINE = 0.985  # between the embeddings of near duplicates
SIDE, FREQUENCIES = 32, 8  # of the small picture, and how many of its frequencies count (Zauner 2010, sec. 3.2.1)


def phash(image: np.ndarray) -> int:
    """A 64-bit hash of what an image looks like: the signs of its low frequencies (Zauner, thesis, 2010, sec. 3.2.1).

    image: RGB uint8 (H, W, 3), any size from 1 pixel. The grey image at 32 x 32, its DCT-II, of that the frequencies
    1 to 8 in both directions; a bit, the highest first in rows, is set where a coefficient is above their median.
    Returns 0 <= hash < 2**64, 0 for an image of one colour. Copies at another size or JPEG quality differ in few bits.
    """
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float64)
    waves = _waves()
    low = (waves @ small @ waves.T).round(6)  # (8, 8); rounded, so that a flat image has no noise for a sign
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


@cache
def _waves() -> np.ndarray:
    """The cosines of the DCT-II of length 32: frequencies 1 to 8, (8, 32)."""
    return np.cos(np.pi / SIDE * np.outer(np.arange(1, FREQUENCIES + 1), np.arange(SIDE) + 0.5))


class Kept:
    """The images that a category has kept so far, to which the next one is compared."""

    def __init__(self, room: int, width: int):
        """room: how many there will be at most. width: D of the embeddings."""
        self._count, self._digests = 0, set()
        self._hashes, self._embeddings = np.zeros(room, np.uint64), np.zeros((room, width), np.float32)

    def duplicate(self, sha256: str, phash: int, embedding: np.ndarray) -> str:
        """Why an image is not to be kept beside the others: `duplicate`, `near_duplicate`, or "" for none.

        sha256: of its file. embedding: (D,), a unit vector.
        """
        if sha256 in self._digests:
            return "duplicate"
        hashes, embeddings = self._hashes[: self._count], self._embeddings[: self._count]
        near = np.bitwise_count(hashes ^ np.uint64(phash)) <= MOST_BITS
        return "near_duplicate" if near.any() or (embeddings @ embedding >= LEAST_COSINE).any() else ""

    def add(self, sha256: str, phash: int, embedding: np.ndarray) -> None:
        """Keep an image. Arguments as of `duplicate`."""
        self._hashes[self._count], self._embeddings[self._count] = phash, embedding
        self._digests.add(sha256)
        self._count += 1
