"""A task of `evaluate` that tests make up: ratios, counts and lists, some of them no measure, with an option."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raypipe.evaluation.task import Task, Value
from raypipe.masks import decode_segments


@dataclass(frozen=True)
class Area(Task):
    """By how much the first mask is too large, and the IoU of all its pixels in all images."""

    least: int = 0  # labels of fewer pixels are not measured

    COLUMNS = (
        ("excess", pa.float64()),  # (mask - label) / label in pixels: below 0 for small masks, NaN for two empty ones
        ("both", pa.int64()),
        ("either", pa.int64()),
        ("thirds", pa.list_(pa.float64(), 3)),  # share of the label in each third of the width
    )
    SHOWN = {
        "excess": Value("Excess", "of the label", better="low"),
        "iou": Value("IoU", "of all pixels", tie="right"),
        "right": Value("Right", "labels in the right third"),
    }
    METRIC = "iou"
    PER_IMAGE = ("excess",)

    def measure(self, row: dict, label: np.ndarray) -> dict:
        if label.sum() < self.least:
            return {"excess": None}
        mask, columns = decode_segments(row["segments"], label.shape)[0], np.array_split(label, 3, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            excess = (mask.sum() - label.sum()) / label.sum()
            thirds = [column.sum() / label.sum() for column in columns]
        return {"excess": excess, "both": (mask & label).sum(), "either": (mask | label).sum(), "thirds": thirds}

    def summary(self, sums) -> dict:
        both, either, thirds = (sums.total(name) for name in ("both", "either", "thirds"))
        return {
            "excess": sums.mean("excess"),
            "iou": both / either if either else None,
            "right": thirds and thirds[2],
        }


TASK = Area
