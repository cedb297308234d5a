"""`raypipe demo`: the main job, with methods that need no weights, on the photographs that scikit-image ships."""

from __future__ import annotations

import os
from dataclasses import dataclass

# Those that lie in scikit-image's wheel; the others it would download.
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "coins", "hubble_deep_field", "retina", "rocket")


@dataclass(frozen=True)
class Demo:
    """Label sample photographs by two methods without any download and draw picture sheets of the masks."""

    output: str = "raypipe-demo"  # a folder for the photographs and the runs


@dataclass(frozen=True)
class Result:
    """The demo's runs."""

    images: int
    labelled: int  # in both; 0 when an earlier demo did
    seconds: float
    run: str
    sheet: str
    objects: str  # the sheet of TokenCut

    def text(self) -> str:
        """What to look at and what to do next."""
        when = f"in {self.seconds:.0f} s" if self.labelled else "by an earlier demo"
        return (
            f"\n{self.images} photographs labelled by K-Means within GrabCut and by TokenCut, {when}.\n\n"
            f"Look at       {self.sheet}: two colours inside each object\n"
            f"              {self.objects}: the object, by colour alone; networks find it better\n"
            f"Your photos   raypipe label kmeans --input YOUR/FOLDER --output runs/first --foreground grabcut --sheet\n"
            f"Read masks    python -c \"import raypipe; print(raypipe.load('{self.run}').to_pandas())\"\n"
            f"Methods       raypipe methods"
        )


def demo(options: Demo) -> Result:
    """Write the photographs, but for those already there, and label them twice."""
    import skimage.data
    from PIL import Image

    import raypipe

    photographs, run, objects = (os.path.join(options.output, name) for name in ("photos", "kmeans", "tokencut"))
    os.makedirs(photographs, exist_ok=True)
    for name in PHOTOGRAPHS:
        path = os.path.join(photographs, f"{name}.png")
        if not os.path.exists(path):
            Image.fromarray(getattr(skimage.data, name)()).save(path)
    of_each = [
        raypipe.label("kmeans", photographs, run, foreground="grabcut", refine="guided", sheet=True),
        raypipe.label("tokencut", photographs, objects, weights="color", refine="bilateral", sheet=True),
    ]
    labelled, seconds = (sum(getattr(each, name) for each in of_each) for name in ("labelled", "seconds"))
    return Result(len(PHOTOGRAPHS), labelled, seconds, run, *(each.sheet for each in of_each))
