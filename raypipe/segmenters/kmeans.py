"""K-Means on the colours inside a foreground: one mask per cluster, ordered dark to light (GloPER supplement).

The semantics are those of `cv2.kmeans` with random centres. It runs on the distinct colours weighted by their counts,
which is exact, and moves all attempts together on a coarse histogram before the best one is finished on every colour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.segmenters import _inside
from raypipe.segmenters._clusters import MOST, lloyd
from raypipe.types import PatternSegmenter, Segments

COLOURS = 1 << 24
COARSE_BITS = 5  # per channel of the warm-up histogram: 32768 bins, of which a photograph fills a few thousand
FEW = 4096  # distinct colours up to here need no histogram; the 256 of a grey photograph would shrink to 32
MORE = 16  # times more starts at most, where few colours or bins make them cheap: grey photographs have close optima
FINISH = 0.2  # of eps: 20 attempts stop here and there and the best counts; one finish has to go further to match it


@dataclass
class Kmeans(PatternSegmenter):
    """Clusters of colours inside a foreground, ordered dark to light."""

    # k is the GloPER supplement's, the others its reference's; the supplement's "20" may mean max_iter.
    k: int = 2  # number of clusters; 2 to 5 are worth a sweep
    attempts: int = 20  # random starts at least, best kept
    max_iter: int = 100  # updates of the centres in one attempt
    eps: float = 1.0  # stop when no centre moved further, in grey levels
    size: int | None = None  # square working size; the reference's 1024 gains nothing here and loses the aspect ratio

    source = "MacQueen 1967, with the settings of the GloPER supplement (Chen, Koh, Dobbie)"
    licence = "none needed: own code, no weights"
    ends = ("darkest", "lightest")
    random = True
    parts = tuple(f"cluster {i}" for i in range(MOST))  # dark to light

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.k <= MOST:
            raise ValueError(f"kmeans: k must be between 2 and {MOST}, got {self.k!r}")
        if self.attempts < 1:
            raise ValueError(f"kmeans: attempts must be at least 1, got {self.attempts!r}")
        if self.max_iter < 2:
            raise ValueError(f"kmeans: max_iter must be at least 2, got {self.max_iter!r}")
        if not self.eps >= 0:
            raise ValueError(f"kmeans: eps must not be negative, got {self.eps!r}")
        _inside.check_size(self.name, self.size, smallest=_inside.MIN_SIDE)

    def untiled(self) -> str:
        return "whose colours in one tile are not those in another; it looks at every pixel of the whole image anyway"

    def segment(
        self, images: Sequence[np.ndarray], foregrounds: Sequence[np.ndarray] | None = None
    ) -> Iterator[Segments]:
        for image, foreground in zip(images, foregrounds, strict=True):
            yield _inside.at_working_size(self._clusters, image, foreground, self.size)

    def _clusters(self, image: np.ndarray, foreground: np.ndarray) -> Segments:
        codes = pack(image)  # (H, W)
        pixels = codes[foreground]
        note = _inside.unusable(foreground) or ("empty_foreground" if pixels.size < self.k else "")
        if note:
            return Segments(np.zeros((self.k, *foreground.shape), bool), note=note)
        distinct, counts = np.unique(pixels, return_counts=True)
        colours = unpack(distinct)
        if len(colours) <= self.k:
            labels, centres = np.arange(len(colours)), colours  # each colour is its own cluster, the rest stay empty
        else:
            labels, centres, _ = self.fit(colours, counts)
        rank = np.empty(len(centres), np.uint8)
        rank[np.argsort(centres.sum(1), kind="stable")] = np.arange(len(centres))
        label_of_code = np.empty(COLOURS, np.uint8)  # only the entries of this image's colours are ever read
        label_of_code[distinct] = rank[labels]
        label_map = np.full(foreground.shape, self.k, np.uint8)
        label_map[foreground] = label_of_code[pixels]
        masks = np.stack([label_map == i for i in range(self.k)])
        return Segments(masks, note="few_colours" if len(colours) < self.k else "")

    def fit(self, colours: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """The best of at least `attempts` random starts.

        colours: (U, 3) float64, distinct, U > k. counts: (U,) pixels of each.
        Returns labels (U,) int, centres (k, 3) and the sum of squared distances of all pixels.
        """
        bins, sizes = coarsen(colours, counts) if len(colours) > FEW else (colours, counts)
        starts = self.attempts * min(MORE, max(1, FEW // len(bins))) if self.attempts > 1 else 1
        low, high = colours.min(0), colours.max(0)
        # OpenCV draws from the data's box, enlarged on each side by 1 / dims of its extent
        where = np.random.default_rng(self.seed).uniform(-1 / 3, 4 / 3, (starts, self.k, 3))
        centres = low + (high - low) * where
        # Bins hold exact sums, so `spread` ranks the attempts as all colours would, up to a constant. Iterations are
        # cheap here, so that every attempt may settle.
        _, centres, spread = lloyd(bins, sizes, centres, max_iter=self.max_iter, eps=0)
        best = centres[[spread.argmin()]]
        labels, centres, spread = lloyd(colours, counts, best, max_iter=self.max_iter, eps=FINISH * self.eps)
        return labels[0], centres[0], spread[0]


def pack(image: np.ndarray) -> np.ndarray:
    """RGB uint8 (..., 3) to one uint32 code per pixel, red highest."""
    red, green, blue = (image[..., i].astype(np.uint32) for i in range(3))
    return red << 16 | green << 8 | blue


def unpack(codes: np.ndarray) -> np.ndarray:
    """Codes (U,) to colours float64 (U, 3) in 0..255."""
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1).astype(np.float64)


def coarsen(colours: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours (U, 3) and counts (U,) to the means (M, 3) and counts (M,) of the occupied histogram bins."""
    cells = (colours.astype(np.uint32) >> 8 - COARSE_BITS) @ np.array(
        [1 << 2 * COARSE_BITS, 1 << COARSE_BITS, 1], np.uint32
    )
    sizes = np.bincount(cells, counts)
    used = np.flatnonzero(sizes)
    sums = np.stack([np.bincount(cells, counts * channel)[used] for channel in colours.T], 1)
    return sums / sizes[used, None], sizes[used]


SEGMENTER = Kmeans
