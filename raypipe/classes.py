"""Class lists: which categories are looked for, in which order, and what CLIP is asked about each."""

from __future__ import annotations

import functools
import html
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from raypipe.lookup import one_line, suggest

LISTS = Path(__file__).with_name("classes.json")  # those of data sets, without their background
FILES = (".txt", ".yaml", ".yml", ".json", ".csv")  # a text that ends so is meant as a file
PATHS = ("/", "./", "../", "~")  # and so is one that begins so


class Category(NamedTuple):
    """One category. query: the text that CLIP is asked with, the name where none was given."""

    name: str
    query: str


@dataclass(frozen=True)
class Classes:
    """Categories in order: in a label map 0 is background and `categories[i]` has the value i + 1.

    source: the name of a data set's list, or "". Names in `names` are distinct, and so are queries.
    """

    source: str
    categories: tuple[Category, ...]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """What each category is called in the rows of a run: its name, or its query where others share the name."""
        taken = Counter(normalised(category.name) for category in self.categories)
        return tuple(each.query if taken[normalised(each.name)] > 1 else each.name for each in self.categories)

    @property
    def queries(self) -> tuple[str, ...]:
        return tuple(category.query for category in self.categories)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """The value in a label map of each name, `normalised`; other names that the data set has are in it too."""
        found = {normalised(name): i for i, name in enumerate(self.names, 1)}
        aliases = facts(self.source)["aliases"] if self.source else {}
        return found | {normalised(other): found[normalised(name)] for other, name in aliases.items()}


def names() -> list[str]:
    """The data sets whose class lists are known."""
    return list(_lists())


def facts(name: str) -> Mapping:
    """What is known of a data set's list but for its categories.

    ignore_index: the value of pixels that do not count in its label maps. aliases: other names of its categories, to
    their names. Where the data set has them, in the order of the categories: source_ids, its own numbers; wnids, its
    folders. images: how many a split has, where it tells copies apart. Raises ValueError for an unknown list.
    """
    if name not in _lists():
        raise ValueError(f"unknown class list {name!r}; {suggest(name, names())}")
    return {"aliases": {}} | {key: value for key, value in _lists()[name].items() if key != "categories"}


def read(text: str) -> Classes:
    """The categories that an option `classes` means.

    text: the name of a data set's list; a local file with a name per line (`#` begins a comment) or a YAML list of
    names and of entries of name and query; such a list itself, beginning with `[`; or names separated by commas.
    HTML entities are read as what they stand for, for CLIP's tokenizer in transformers does not know them.
    Raises ValueError, or FileNotFoundError, for no category, an empty name, categories that CLIP could not tell apart.
    """
    text = text.strip()
    if text in _lists():
        return Classes(text, _checked(_lists()[text]["categories"], text))
    if text.startswith("["):
        return Classes("", _checked(_entries(text, "the list"), "the list"))
    file = os.path.expanduser(text)
    if os.path.isfile(file) or ("/" in text and os.path.isdir(file)):  # no error where the text is too long for a path
        return Classes("", _checked(_from_file(Path(file)), file))
    _check_meaning(text)
    return Classes("", _checked(text.split(",") if text else [], "the names"))


def settle(text: str) -> str:
    """The same classes without any file: the name of a data set's list stays, all else becomes a list itself.

    Equal categories give equal texts, however they were written. Raises what `read` raises.
    """
    found = read(text)
    if found.source:
        return found.source
    plain = [
        each.name if each.name == each.query else {"name": each.name, "query": each.query} for each in found.categories
    ]
    return json.dumps(plain, ensure_ascii=False)


def normalised(name: str) -> str:
    """A name as names are compared: without case, `_` and `-` as blanks."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


@functools.cache
def _lists() -> dict[str, dict]:
    return json.loads(LISTS.read_text(encoding="utf-8"))


def _check_meaning(text: str) -> None:
    """Raise for one word that reads like a file or a data set's list and is neither, and for names in quotes."""
    if '"' in text:
        raise ValueError('classes: names separated by commas have no quotes; write ["a, b", c] where they need them')
    if "," in text:
        return
    way_out = f"write [{text}] for a category of that name"
    if text.lower().endswith(FILES) or text.startswith(PATHS):
        raise FileNotFoundError(f"classes: there is no local file {text!r}; {way_out}")
    begun = [name for name in names() if len(text) > 2 and name.startswith(text.lower())]  # voc, VOC2012, cityscapes
    hint = f"did you mean {begun[0]!r}?" if begun else suggest(text.lower(), names())
    is_code = begun or any(character.isdigit() or character == "_" for character in text)
    if is_code and hint.startswith("did you mean"):
        raise ValueError(f"classes: {text!r} is no list of a data set; {hint} Or {way_out}")


def _from_file(file: Path) -> list:
    """The names or entries in a local file."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"classes: {file} cannot be read as a text of names ({one_line(error)})") from error
    lines = [line.strip() for line in content.rstrip().splitlines()]
    lines = [line for line in lines if not line.startswith("#")]
    first = next(filter(None, lines), "")
    if file.suffix.lower() in (".yaml", ".yml", ".json") or first.startswith(("- ", "[")):
        return _entries(content, str(file))
    if "," in "".join(lines) and (file.suffix.lower() == ".csv" or len(lines) == 1):  # some of ImageNet's names have
        text = f"{file} has commas where a name per line was expected; write a line for each"
        raise ValueError(f"classes: {text}, or YAML entries of name and query")
    return lines


def _entries(text: str, place: str) -> list:
    """A YAML or JSON list. Every scalar stays a text: a category may be called `no` or `1984`."""
    import yaml

    try:
        found = yaml.load(text, yaml.BaseLoader)  # builds texts, lists and dictionaries, nothing else
    except yaml.YAMLError as error:
        raise ValueError(f"classes: {place} cannot be read as YAML ({one_line(error)})") from error
    if found is not None and not isinstance(found, list):
        kind = type(found).__name__
        raise ValueError(f"classes: {place} must be a list of names, or of entries of name and query, got a {kind}")
    return found or []


def _category(entry: object, number: int, place: str) -> Category:
    """One name, or entry of name and query. Raises ValueError for anything else, and for empty texts."""
    fields = entry if isinstance(entry, dict) else {"name": entry}
    values = [fields.get("name"), fields.get("query", fields.get("name"))]
    if fields.keys() - {"name", "query"} or not all(isinstance(value, str) for value in values):
        text = f"category {number} of {place} must be a name, or an entry of name and query"
        raise ValueError(f"classes: {text}, got {entry!r}")
    name, query = (" ".join(html.unescape(value).split()) for value in values)
    if not (normalised(name) and normalised(query)):
        raise ValueError(f"classes: category {number} of {place} has an empty name or query; leave it out or name it")
    if unseen := [character for character in name + query if unicodedata.category(character) == "Cc"]:
        raise ValueError(f"classes: category {number} of {place} has the control character {unseen[0]!r}; take it out")
    return Category(name, query)


def _checked(entries: Iterable[object], place: str) -> tuple[Category, ...]:
    """The categories. Raises ValueError where there is none, and where two have one query or would have one name."""
    found = tuple(_category(entry, number, place) for number, entry in enumerate(entries, 1))
    if not found:
        raise ValueError("classes: expected one category at least, got none; pass names, a file, or a data set's list")
    doubled = _doubled([category.query for category in found])
    if doubled:
        way_out = "give each a query of its own, as in [{name: crane, query: crane bird}, ...]"
        text = "; ".join(" and ".join(f"{found[i].name!r} ({i + 1})" for i in same) for same in doubled)
        raise ValueError(f"classes: CLIP would be asked the same about {text} of {place}; {way_out}")
    shown = Classes("", found).names
    if doubled := _doubled(shown):
        text = "; ".join(f"{' and '.join(str(i + 1) for i in same)} ({shown[same[0]]!r})" for same in doubled)
        raise ValueError(f"classes: categories {text} of {place} could not be told apart by name; rename one")
    return found


def _doubled(texts: Iterable[str]) -> list[list[int]]:
    """Which places hold texts that are equal when normalised."""
    places: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        places.setdefault(normalised(text), []).append(i)
    return [same for same in places.values() if len(same) > 1]
