"""One file per format; its name is the format's name. Looking one up imports that format only.

A format is a module with ORIGINALS (what makes of an original the row's `picture`: `originals.portable`,
`originals.decode`; None = it needs no pictures), CATEGORIES (it names what a segment shows), where it lists failed
images too FAILED, where it takes segments with their embeddings EMBEDDINGS, where it needs one of some class lists
LISTS, and `write(images, target, about)`, which streams rows of the masks table into a folder and returns what the user
should know: sentences with how often. Options of the verb that only it has are in OPTIONS; `write` gets those that are
given by their names, and so does `choose(images, about)`, which may leave rows out before their pictures are
fetched. It never imports Ray or `pipeline`.

A whole format, which would be the file `export/formats/counts.py`:

>>> from collections import Counter
>>> ORIGINALS, CATEGORIES = None, False
>>> def write(images, target, about):
...     '''Write counts.txt: how many segments each image has.'''
...     remarks = Counter()
...     with target.stream("counts.txt") as file:
...         for row in images:  # one at a time: a run may not fit into memory
...             file.write(f"{len(row['segments'])} {row['key']}\\n".encode())
...             remarks["images have no segment"] += not row["segments"]
...     return remarks

What `raypipe export` makes of it:

>>> import tempfile
>>> from raypipe.export.target import Target
>>> with tempfile.TemporaryDirectory() as folder, Target(folder) as target:
...     remarks = write(iter([{"key": "a.jpg", "segments": []}]), target, None)
...     print(open(f"{folder}/counts.txt").read().strip(), dict(remarks))
0 a.jpg {'images have no segment': 1}
"""

from types import ModuleType

from raypipe import lookup


def names() -> list[str]:
    """All formats, sorted."""
    return lookup.modules(__path__)


def find(name: str) -> ModuleType:
    """The format's module. Raises ValueError with the nearest known name for an unknown one."""
    return lookup.module(__name__, name, names(), kind="format")
