"""Each image of a corpus as a unit vector of CLIP: a run like any other, whose rows are embeddings instead of masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from raypipe import networks, schema
from raypipe.archive.duplicates import phash
from raypipe.features import clip
from raypipe.pipeline.stages import Work
from raypipe.types import BadImage, Segmenter, Segments

METHOD = "clip"  # what the runs say that they are made by
RESIZE = "shorter side by Pillow's bicubic filter, then the middle square"  # frozen: tensors round otherwise


@dataclass
class Embedded(Segments):
    """What CLIP makes of one image; it has no masks."""

    embedding: np.ndarray | None = None  # float32 (D,), of length 1


@dataclass
class Embedder(Segmenter):
    """Embeds the squares that CLIP sees of images."""

    clip: str = "openai/clip-vit-large-patch14-336"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    name = "archive"
    licence = "MIT"
    networks, licences, model_types = ("clip",), {"clip": "MIT"}, {"clip": "clip"}
    gpus = 1.0
    batch_size = 64  # 37,000 tokens of a ViT-L/14 at 336 px fill a GPU; on the CPU each image goes through alone
    timeout = 120.0  # a ViT-L/14 at 336 px takes one core about 10 s

    def __post_init__(self):
        networks.settle_options(self)

    def fetch(self) -> None:
        networks.locate(self.clip, method=self.name, option="clip")

    def load(self, device: str) -> None:
        self._path = networks.locate(self.clip, method=self.name, option="clip")
        self._clip = clip.Clip(self._path, method=self.name, device=device, dtype=self.dtype, text=False)
        self._is_alone = device != "cuda"

    @property
    def side(self) -> int:
        """After `load`: of the square that CLIP sees, in px."""
        return self._clip.size

    def checksums(self) -> dict[str, str]:
        return networks.checksums(self._path)

    def segment(self, images: Sequence[np.ndarray], foregrounds=None) -> Iterator[Embedded]:
        """images: uint8 (side, side, 3), of `features.clip.prepare`."""
        for first in range(0, len(images), self.batch_size):
            squares = images[first : first + self.batch_size]
            count = len(squares)
            if not self._is_alone:  # always one shape: else the last bits depend on how many there are
                squares = [*squares, *[np.zeros_like(squares[0])] * (self.batch_size - count)]
            for square, embedding in zip(squares, self._clip.embed_prepared(squares)[:count], strict=False):
                if not np.isfinite(embedding).all():
                    raise BadImage("segment", "not_finite", "the embedding is not finite: overflow or damaged weights")
                yield Embedded(np.zeros((0, *square.shape[:2]), bool), embedding=embedding)


@dataclass(frozen=True)
class Embedding(Work):
    """What the workers need to know to embed."""

    table: str = "embeddings"  # the name of its columns in schema.TABLES: with 16 bits a value, or 32
    side: int = 0  # of the square that CLIP sees; known once it is loaded

    verb = "embed"

    @property
    def columns(self) -> pa.Schema:
        return schema.TABLES[self.table]

    def learned(self) -> dict:
        return {"side": self.segmenter.side}

    def prepared(self, row: dict) -> dict:
        """The square and the hash of an image, instead of all of it."""
        return row | {"image": clip.prepare(row["image"], self.side), "phash": phash(row["image"])}

    def encoded(self, row: dict) -> dict:
        kind = self.columns.field("embedding").type.value_type.to_pandas_dtype()
        return {"embedding": row["found"].embedding.astype(kind), "note": row["note"]}


def settings(embedder: Embedder) -> dict:
    """What decides the rows: what run.json freezes beside the weights' checksums."""
    return {"clip": embedder.clip, "dtype": embedder.dtype, "resize": RESIZE}
