"""Which images of which archive make which vector of a bank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from raypipe import schema
from raypipe.classes import Category, normalised, read
from raypipe.inputs import archives
from raypipe.lookup import suggest

if TYPE_CHECKING:
    from raypipe.inputs.archives import Archive
    from raypipe.training.reco import ReCo

SERVES = pa.list_(pa.struct([("number", pa.int32()), ("rank", pa.int32())]))  # column: of which vectors, as which image
ALIASES = {"vegetation": "tree"}  # names of data sets that are a context under another name (reference)
NAMED = 5  # missing categories that an error names


class Vector(NamedTuple):
    """One vector to be made."""

    name: str
    query: str
    images: pa.Table  # rows of schema.MANIFEST, the best first


@dataclass(frozen=True)
class Plan:
    """All that a bank is made of."""

    contexts: tuple[Vector, ...]  # in the order in which they are made; each leaves out those before it
    others: tuple[Vector, ...]  # leave out all contexts
    classes: tuple[Category, ...]  # of the bank, in label order
    places: tuple[int, ...]  # of each class: its vector among the contexts and the others behind them

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """All that are to be made."""
        return self.contexts + self.others

    def rows(self) -> pa.Table:
        """The images, each once: rows of schema.MANIFEST with the column `serves`, SERVES. Keys are made unique."""
        found, keys = {}, set()
        for number, vector in enumerate(self.vectors):
            for rank, row in enumerate(vector.images.to_pylist()):
                if row["image_id"] not in found:
                    row["key"] = row["uri"] if row["key"] in keys else row["key"]  # two archives may share one
                    keys.add(row["key"])
                its = found.setdefault(row["image_id"], row | {"serves": []})
                its["serves"].append({"number": number, "rank": rank})
        columns = pa.schema([*schema.MANIFEST, ("serves", SERVES)])
        return pa.Table.from_pylist(list(found.values()), schema=columns)


def plan(recipe: ReCo) -> Plan:
    """What a recipe's bank is made of. Raises FileNotFoundError and ValueError for what its archives lack."""
    archive, *more = _archives(recipe)
    contexts = _contexts(recipe, [*more, archive]) if recipe.context_elimination else ()
    at, others = {normalised(each.name): i for i, each in enumerate(contexts)}, []
    classes, places, missing = _classes(recipe, archive), [], []
    for category in classes:
        name = normalised(category.name)
        if (place := at.get(name, at.get(ALIASES.get(name)))) is None:
            vector, place = _vector(archive, category, recipe.k), len(contexts) + len(others)
            missing += [] if vector else [category.name]
            others += [vector] if vector else []
        places.append(place)
    if missing:
        known = [name for name in archive.classes.names if _vector(archive, Category(name, name), 1)]
        text = f"has no images of {_listed(missing)}; {suggest(missing[0], known)}"
        raise ValueError(f"{recipe.name}: {archive.place} {text}, or name those with images as --classes")
    return Plan(contexts, tuple(others), classes, tuple(places))


def _archives(recipe: ReCo) -> list[Archive]:
    """The archive and, where there is one, that of the contexts."""
    places = [place for place in (recipe.archive, recipe.context_archive) if place is not None]
    published = [place.lower().endswith(".json") for place in places]
    if recipe.image_root is not None and not any(published):
        raise ValueError(f"{recipe.name}: image_root has no effect: archives in folders know where their images are")
    roots = [recipe.image_root if is_published else None for is_published in published]
    return [archives.read(place, image_root=root) for place, root in zip(places, roots, strict=True)]


def _classes(recipe: ReCo, archive: Archive) -> tuple[Category, ...]:
    """The bank's classes: their names as rows show them, and what CLIP is asked of each.

    Where the option `classes` names a category without an own query, that of the archive is taken.
    """
    chosen = archive.classes if recipe.classes is None else read(recipe.classes)
    asked = dict(zip(map(normalised, archive.classes.names), archive.classes.queries, strict=True))
    pairs = zip(chosen.names, chosen.queries, strict=True)
    return tuple(
        Category(name, asked.get(normalised(name), query) if query == name else query) for name, query in pairs
    )


def _contexts(recipe: ReCo, places: list[Archive]) -> tuple[Vector, ...]:
    """Those of the recipe, each from the first of the archives that has images of it."""
    found = {}
    for name in recipe.contexts:
        each = (_vector(archive, Category(name, name), recipe.k) for archive in places)
        found[name] = next(filter(None, each), None)
    if missing := [name for name, vector in found.items() if not vector]:
        where = " and ".join(str(archive.place) for archive in places)
        command = f"raypipe archive --input CORPUS --classes {','.join(missing)} --n {recipe.k} --output DIR"
        command += " --concepts default --faces none"
        text = f"no images of the contexts {_listed(missing)} in {where}; make them with `{command}`"
        way_out = "and pass --context-archive DIR, or pass --no-context-elimination"
        raise ValueError(f"{recipe.name}: {text} {way_out}")
    return tuple(found.values())


def _vector(archive: Archive, category: Category, k: int) -> Vector | None:
    """The k best images of a category, bound by name; None where the archive has none."""
    known = {normalised(name): i for i, name in enumerate(archive.classes.names)}
    if (i := known.get(normalised(category.name))) is None:
        return None
    images = archive.of(archive.classes.names[i]).slice(0, k)
    query = archive.classes.queries[i] if category.query == category.name else category.query
    return Vector(category.name, query, images) if len(images) else None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(map(repr, names[:NAMED])) + more
