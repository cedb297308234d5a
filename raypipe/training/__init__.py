"""Training: what a method needs, learned on Ray Train or made at once of images without labels.

`train` is the verb (its options: `job`): it checks, lists, starts workers and leaves a folder that `--weights` takes.
`loop` is what each worker does, `work` what it is told, `workers` how Ray Train has it done, and `checkpoints` what
makes it go on where it was. `data` holds the images ready for any order, `augment` changes them by numbers that depend
on nothing but seed, epoch and image, `record` keeps the losses, `page` shows them. Each method that can be trained has
a file or folder of its name, with its `Recipe` (see `recipe`).

It may import all rooms but cli, benchmark and sweep.
"""

from raypipe import lookup, segmenters
from raypipe.training.recipe import Recipe


def names() -> list[str]:
    """All methods that can be trained, sorted: those with a file here."""
    return [name for name in lookup.modules(__path__) if name in segmenters.names()]


def find(name: str) -> type[Recipe]:
    """The dataclass of a method's training. Raises ValueError, with the nearest known name, for an unknown one."""
    return lookup.module(__name__, name, names(), kind="method to train").RECIPE
