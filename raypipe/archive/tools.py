"""What makes an archive of embeddings: texts, ranking, rows and faces, in this process or on Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raypipe import images, networks
from raypipe.archive import retrieval
from raypipe.archive.embedding import Embedder
from raypipe.archive.topk import Ranked
from raypipe.features.clip import Clip
from raypipe.inputs.manifest import fetch
from raypipe.pictures.faces import FaceFilter
from raypipe.run import Run, rows
from raypipe.runtime.cores import device_here
from raypipe.types import BadImage

COLUMNS = ["image_id", "key", "uri", "sha256", "phash", "height", "width", "embedding", "error"]
LOOKED_AT = 8  # images whose faces are looked for in one go
FEW = 65_536  # rows that are read and ranked in less time than a process takes to start
MOST_CONSUMERS = 32  # processes that rank: each holds the best of all categories


@dataclass(frozen=True)
class Look:
    """Looks for faces in images."""

    faces: FaceFilter
    max_pixels: int
    max_bytes: int

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Why images are left out: `face`, `broken` where they cannot be read any more, or "". batch: MANIFEST."""
        found = [self._why(content) for content in fetch(batch.to_pylist(), max_bytes=self.max_bytes)]
        return pa.table({"image_id": batch["image_id"], "why": pa.array(found, pa.string())})

    def _why(self, content: bytes | BadImage) -> str:
        try:
            if isinstance(content, BadImage):
                return "broken"
            return "face" if len(self.faces.detect(images.decode(content, max_pixels=self.max_pixels))[1]) else ""
        except BadImage:
            return "broken"


def embedded_texts(
    embedder: Embedder, device: str, queries: Sequence[str], templates: str
) -> tuple[np.ndarray, dict[str, str]]:
    """What CLIP makes of texts: float32 (C, D), unit rows; and the checksums of its weights."""
    path = networks.locate(embedder.clip, method=embedder.name, option="clip")
    found = Clip(path, method=embedder.name, device=device, vision=False).texts(queries, templates)
    return found, networks.checksums(path)


class Here:
    """In this process."""

    def __init__(self, run: Run, embedder: Embedder, device: str):
        self._run, self._embedder, self._device = run, embedder, device_here(device, gpus=embedder.gpus)

    def texts(self, queries: Sequence[str], templates: str) -> tuple[np.ndarray, dict[str, str]]:
        """As `embedded_texts`."""
        return embedded_texts(self._embedder, self._device, queries, templates)

    def rank(self, queries: np.ndarray, k: int, among: pa.Array | None) -> list[Ranked]:
        """The k best images for each query, named (key, image_id). among: ids of those that count; None = all."""
        return retrieval.rank(self._parts(retrieval.RANKED_COLUMNS), queries, k, among).result()

    def look_up(self, ids: pa.Array) -> pa.Table:
        """COLUMNS of some images, in their order."""
        return retrieval.look_up(self._parts(COLUMNS), ids)

    def faces(self, manifest: pa.Table, look: Look) -> pa.Table:
        """What `look` says of images, in any order. manifest: schema.MANIFEST."""
        return look(manifest)

    def _parts(self, names: list[str]) -> Iterator[pa.Table]:
        return rows.columns(self._run, names)


class OnRay(Here):
    """The same on Ray, which is there; of few images all but the network and the faces still in this process."""

    def __init__(self, run: Run, embedder: Embedder, device: str, actors: int | None):
        from raypipe.runtime import cluster

        self._run, self._embedder, self._count = run, embedder, len(run.commits())
        self._resources = cluster.resources(gpus=embedder.gpus, device=device, actors=actors)

    def texts(self, queries: Sequence[str], templates: str) -> tuple[np.ndarray, dict[str, str]]:
        import ray

        from raypipe.runtime.cluster import overheard, told

        task = ray.remote(num_cpus=1, num_gpus=self._resources.gpus)(overheard)
        return told(task.remote(embedded_texts, self._embedder, self._resources.device, queries, templates))

    def rank(self, queries: np.ndarray, k: int, among: pa.Array | None) -> list[Ranked]:
        import ray

        if self._count <= FEW:
            return super().rank(queries, k, among)
        consumers = max(1, min(MOST_CONSUMERS, self._count // FEW, int(ray.cluster_resources().get("CPU", 1)) - 1))
        dataset = self._dataset(retrieval.RANKED_COLUMNS)
        return retrieval.rank_on_ray(dataset, queries, k, consumers=consumers, among=among).result()

    def look_up(self, ids: pa.Array) -> pa.Table:
        return super().look_up(ids) if self._count <= FEW else retrieval.look_up_on_ray(self._dataset(COLUMNS), ids)

    def faces(self, manifest: pa.Table, look: Look) -> pa.Table:
        import ray.data

        found = ray.data.from_arrow(manifest).repartition(target_num_rows_per_block=4 * LOOKED_AT)
        found = found.map_batches(_looked, fn_args=(look,), batch_size=LOOKED_AT, batch_format="pyarrow", num_cpus=1)
        return pa.concat_tables(found.iter_batches(batch_size=None, batch_format="pyarrow"))

    def _dataset(self, names: list[str]):
        import ray.data

        folder, data = self._run.folder, self._run.data
        paths = [folder.path(data, name) for name in self._run.parts()]
        return ray.data.read_parquet(paths, filesystem=folder.fs, partitioning=None).select_columns(names)


def _looked(batch: pa.Table, look: Look) -> pa.Table:
    import cv2

    cv2.setNumThreads(1)  # as many processes as cores share the machine
    return look(batch)
