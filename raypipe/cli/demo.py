"""`raypipe demo`: the main job, with methods that need no weights, on the photographs that scikit-image ships.

The quicker method goes first and without Ray, so that there is a picture to look at while Ray starts.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

log = logging.getLogger("raypipe")

# Of those in scikit-image's wheel (the others it would download) the ones in colour, or with coins, that show objects.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "coins", "rocket", "stereo_motorcycle")


@dataclass(frozen=True)
class Demo:
    """Label sample photographs by two methods without any download, and show the masks on one page."""

    output: str = "raypipe-demo"  # a folder for the photographs and the runs


@dataclass(frozen=True)
class Result:
    """The demo's runs."""

    images: int
    labelled: int  # in both; 0 when an earlier demo did
    seconds: float
    run: str
    report: str  # the page about both runs

    def text(self) -> str:
        """What to look at and what to do next."""
        when = f"in {self.seconds:.0f} s" if self.labelled else "by an earlier demo"
        return (
            f"\n{self.images} photographs labelled by TokenCut (the object, here by colour alone; with a network it\n"
            f"finds far more) and, on Ray, by K-Means within GrabCut (two colours inside each object), {when}.\n\n"
            f"Look at        {self.report}\n\n"
            "Then, with your own photographs:\n"
            "What is here   raypipe doctor\n"
            "Label them     raypipe label kmeans --input YOUR/FOLDER --output runs/first --foreground grabcut --sheet\n"
            "               (with --dry-run it only tells how long that takes and how large it gets)\n"
            "The objects    raypipe label tokencut --input YOUR/FOLDER --output runs/objects --refine bilateral\n"
            "Compare        raypipe report runs/first runs/objects\n"
            "Hand them on   raypipe export runs/first --format coco\n"
            f"Read masks     python -c \"import raypipe; print(raypipe.load('{self.run}').to_pandas())\"\n"
            "Other methods  raypipe methods"
        )


def demo(options: Demo) -> Result:
    """Write the photographs, but for those already there, label them twice, and write a page about both runs."""
    import skimage.data
    from PIL import Image

    import raypipe
    from raypipe.report.report import Report, report

    photographs, run, objects, page = (
        os.path.join(options.output, name) for name in ("photos", "kmeans", "tokencut", "report.html")
    )
    os.makedirs(photographs, exist_ok=True)
    for name in PHOTOGRAPHS:
        path = os.path.join(photographs, f"{name.removeprefix('stereo_')}.png")
        if not os.path.exists(path):
            found = getattr(skimage.data, name)()
            Image.fromarray(found[0] if isinstance(found, tuple) else found).save(path)  # the left one of two
    first = raypipe.label("tokencut", photographs, objects, weights="color", refine="bilateral", sheet=True, local=True)
    log.info("the first picture: %s; now two colours inside each object, on Ray", os.path.join(objects, "sheet.png"))
    second = raypipe.label("kmeans", photographs, run, foreground="grabcut", refine="guided", sheet=True)
    labelled, seconds = (getattr(first, name) + getattr(second, name) for name in ("labelled", "seconds"))
    return Result(len(PHOTOGRAPHS), labelled, seconds, run, report(Report((run, objects), page)).report)
