"""What somebody writes who has Ray Data, a method and a folder of images: read, segment in actors, write Parquet.

`python -m raypipe.benchmark.plain._ray_data FOLDER OUTPUT`. A file that is no image stops it, and so does one that
kills its process; a second start does all of it again.
"""

from __future__ import annotations

import os
import sys

METHOD, BATCH = "kmeans", 16


class Segmenter:
    """The method, loaded once per actor."""

    def __init__(self):
        import cv2

        from raypipe import segmenters

        cv2.setNumThreads(1)
        self.method = segmenters.find(METHOD)(foreground="whole")
        self.method.load("cpu")

    def __call__(self, batch: dict) -> dict:
        import numpy as np
        from pycocotools import mask as coco

        wholes = [np.ones(image.shape[:2], bool) for image in batch["image"]]
        masks = []
        for found, whole in zip(self.method.segment(list(batch["image"]), wholes), wholes, strict=True):
            binary = (found.masks > 0.5) & whole
            masks.append([coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in binary])
        rles = [[{"size": list(rle["size"]), "counts": rle["counts"]} for rle in rles] for rles in masks]
        return {"path": batch["path"], "masks": np.array([*rles, None], object)[:-1]}


def main(folder: str, output: str) -> None:
    """Segment all images below a folder."""
    import ray

    cores = os.cpu_count()
    # Two above the cores for reading and writing, as `raypipe label` has them.
    ray.init(num_cpus=cores + 2, include_dashboard=False, ignore_reinit_error=True)
    images = ray.data.read_images(folder, mode="RGB", include_paths=True)
    rows = images.map_batches(Segmenter, batch_size=BATCH, concurrency=cores, num_cpus=1)
    rows.write_parquet(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
