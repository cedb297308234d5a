"""One file per task of `evaluate`; the file's name is the task's name. Knows arrays, never a run.

A task is a frozen dataclass whose fields are its options. It says what it measures in one image (`measure`: numbers
that add up), what that comes to over images (`summary`) and how it is shown; `evaluation.task` has all that it may say
otherwise. `evaluate`, `sweep` and `report` follow it. A whole task, which would be a file that ends with
`TASK = Cover`:

>>> from dataclasses import dataclass
>>> import numpy as np, pyarrow as pa
>>> from raypipe.evaluation.task import Task, Value
>>> from raypipe.masks import decode_segments, encode_segments
>>> @dataclass(frozen=True)
... class Cover(Task):
...     '''How much of what is labelled the masks cover.'''
...     least: int = 1  # a label of fewer pixels gives no measure
...     COLUMNS = (("covered", pa.int64()), ("labelled", pa.int64()))
...     SHOWN = {"cover": Value("Cover", "of all labelled pixels")}
...     METRIC = "cover"
...     def measure(self, row, label):  # label: bool (H, W)
...         covered = decode_segments(row["segments"], label.shape).any(0) & label
...         return {"covered": covered.sum(), "labelled": label.sum()} if label.sum() >= self.least else {}
...     def summary(self, sums):
...         covered, labelled = sums.total("covered"), sums.total("labelled")
...         return {"cover": covered / labelled if labelled else None}
>>> task, label = Cover(least=2), np.eye(2, 3, dtype=bool)
>>> row = {"segments": encode_segments(np.ones((1, 2, 3), bool)), "foreground": None}
>>> task.values(task.sums([task.cells(row, label), task.cells(row, label & False)]))
{'cover': 1.0}
"""

from raypipe import lookup
from raypipe.evaluation.task import Task


def names() -> list[str]:
    """All tasks, sorted."""
    return lookup.modules(__path__)


def find(name: str) -> type[Task]:
    """The task's dataclass. Raises ValueError with the nearest known name for an unknown one."""
    return lookup.module(__name__, name, names(), kind="task").TASK
