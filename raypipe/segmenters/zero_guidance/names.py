"""A name for an embedding: the nearest word of a vocabulary, or the best of given captions; never one on a block-list.

Texts about people can offend (Rewatbowornwong et al., ICCV 2023, supplement H), so an entry of the block-list keeps a
text from being a name where it stands alone or before a word for a person: "asian woman", not "siamese cat".
"""

from __future__ import annotations

import functools
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from raypipe import classes
from raypipe.lookup import json_list, one_line

if TYPE_CHECKING:
    from raypipe.features.clip import Clip

log = logging.getLogger("raypipe")
VOCABULARY, BLOCKED = (Path(__file__).with_name(f"{name}.txt") for name in ("vocabulary", "blocked"))
TEMPLATE = "Image of a {}."  # what CLIP is asked about a name (the method's released code)
KEPT = 5  # nearest words that are looked at before a person's plain noun is
CAUTION = (
    "Names are made by models that have the bias of their data: they may be wrong, or offensive about people, and the "
    "block-list does not catch everything."
)
TINY = 1e-8  # the shortest vector that is divided by its length
TEXTS = 4096  # captions whose vectors are kept
Naming = Literal["retrieval", "zerocap", "retrieval+zerocap"]


class Name(NamedTuple):
    """What a segment is called. vector: float32 (D,), CLIP's of the text in `TEMPLATE`, of length 1."""

    text: str
    score: float  # cosine of the vector and the segment's embedding
    vector: np.ndarray
    note: str = ""  # comma-joined: `label_blocked:ENTRY` of each better text that was blocked, `no_candidate`


class Namer:
    """Names embeddings of segments; the same name for an embedding whatever is named beside it."""

    def __init__(
        self, clip: Clip, *, naming: Naming = "retrieval", vocabulary: str = "default", block: str = "default",
        below: float = 0.0, captions: Callable[[np.ndarray], Sequence[Sequence[str]]] | None = None,
    ):  # fmt: skip
        """clip: whose texts and embeddings are compared. vocabulary, block: see `read_vocabulary`, `read_block`.

        captions: float32 (S, D) to candidates of each row, asked unless naming is `retrieval`; with
        `retrieval+zerocap` only where the nearest word has a cosine less than `below`. Raises ValueError, as
        `read_vocabulary` and `read_block` do, and where every word is blocked.
        """
        self._clip, self._captions, self._block = clip, captions, read_block(block)
        self._words = check_vocabulary(read_vocabulary(vocabulary), self._block)
        self._below = {"retrieval": -np.inf, "zerocap": np.inf}.get(naming, below)
        self._vector = functools.lru_cache(TEXTS)(self._encoded)

    def __call__(self, embeddings: np.ndarray) -> list[Name]:
        """A name for each row of float32 (S, D), not normalised; without a row no network is asked."""
        units = [row / max(float(np.linalg.norm(row)), TINY) for row in np.asarray(embeddings, np.float32)]
        found = [None if self._below == np.inf else self._retrieved(unit) for unit in units]
        asked = [i for i, name in enumerate(found) if name is None or name.score < self._below]
        if asked:
            for i, candidates in zip(asked, self._captions(embeddings[asked]), strict=True):
                found[i] = self._captioned(units[i], candidates)
        return found

    @functools.cached_property
    def _vectors(self) -> np.ndarray:
        """Of the vocabulary: float32 (V, D), rows of length 1. Found when first needed, and once in a process."""
        return self._clip.texts(self._words, json.dumps([TEMPLATE]))

    def _retrieved(self, unit: np.ndarray) -> Name:
        """The nearest word that is not blocked."""
        cosines = self._vectors @ unit  # row by row: a product of many would round by how many they are
        order = np.argsort(-cosines, kind="stable")
        names = (Name(self._words[i], float(cosines[i]), self._vectors[i]) for i in order)
        nearest = list(islice(names, KEPT))
        if found := self._unblocked(nearest, unit):
            return found
        return next(name._replace(note=self._note(nearest)) for name in names if not self._block(name.text))

    def _captioned(self, unit: np.ndarray, candidates: Iterable[str]) -> Name:
        """The candidate of the highest cosine that is not blocked; the nearest word where there is none."""
        texts = dict.fromkeys(filter(None, map(cleaned, candidates)))
        names = sorted((self._scored(text, unit) for text in texts), key=lambda name: -name.score)
        if found := self._unblocked(names, unit):
            return found
        word, note = self._retrieved(unit), self._note(names) or "no_candidate"
        return word._replace(note=_joined(note, word.note))

    def _unblocked(self, names: list[Name], unit: np.ndarray) -> Name | None:
        """The first name that is not blocked, else the plain noun of the first that is about a person, if one is."""
        for i, name in enumerate(names):
            if not self._block(name.text):
                return name._replace(note=self._note(names[:i]))
        nouns = (noun for name in names if (noun := plain_noun(name.text)) and not self._block(noun))
        return next((self._scored(noun, unit)._replace(note=self._note(names)) for noun in nouns), None)

    def _note(self, blocked: Iterable[Name]) -> str:
        entries = (re.sub(r"[\s,]+", "_", self._block(name.text)) for name in blocked)
        return _joined(*(f"label_blocked:{entry}" for entry in entries))

    def _scored(self, text: str, unit: np.ndarray) -> Name:
        vector = self._vector(text)
        return Name(text, float(vector @ unit), vector)

    def _encoded(self, text: str) -> np.ndarray:
        """By itself: in a batch it would be rounded by the texts beside it."""
        row = self._clip.text_features([TEMPLATE.replace("{}", text)])[0].cpu().numpy()
        return row / max(float(np.linalg.norm(row)), TINY)


class Block:
    """A list of words and phrases that no name may have where they say something of a person.

    Each is compared by its `_words`. It counts before a word for a person, and alone in its phrase: "poor old man",
    "two asians with hats", not "swiss roll", "nail polish". One that begins with `!` counts wherever it stands.
    """

    def __init__(self, entries: Iterable[str]):
        texts = {tuple(_words(entry)): entry.lstrip("! ") for entry in entries}
        self._anywhere = {tuple(_words(entry)) for entry in entries if entry.startswith("!")}
        self._texts, self._longest = texts, max(map(len, texts), default=0)

    def __call__(self, text: str) -> str:
        """The first entry that keeps a text from being a name, "" without one."""
        words = _words(text)
        for first in range(len(words)):
            for end in range(min(first + self._longest, len(words)), first, -1):  # the longest first
                key = tuple(words[first:end])
                if key in self._texts and (key in self._anywhere or self._is_of_person(words[:first], words[end:])):
                    return self._texts[key]
        return ""

    def _is_of_person(self, before: list[str], behind: list[str]) -> bool:
        """Whether what stands between these words says something of a person, or belongs to nothing else."""
        said = self._nouns(takewhile(lambda word: word not in _JOINS, reversed(before)))
        ahead = self._nouns(behind)
        return not _PEOPLE.keys().isdisjoint(ahead) or not (ahead or set(said) - _PEOPLE.keys())

    def _nouns(self, words: Iterable[str]) -> list[str]:
        """What is left of a phrase, the words up to the first that ends it, without those that only qualify others."""
        phrase = takewhile(lambda word: word not in _ENDS, words)
        return [word for word in phrase if word not in _LINKS and (word,) not in self._texts]


def plain_noun(text: str) -> str:
    """What a person that a text names is plainly called: man, woman, boy, girl, child, people or person; "" if none."""
    return next((_PEOPLE[word] for word in _words(text) if word in _PEOPLE), "")


def cleaned(text: str) -> str:
    """A text as it becomes a name: lower case, one line, single blanks, without one final full stop.

    "" for one without a letter or digit, and for one that was cut within a character (U+FFFD, half a surrogate pair).
    """
    if any(each == "\N{REPLACEMENT CHARACTER}" or unicodedata.category(each) == "Cs" for each in text):
        return ""
    plain = "".join(each if (kind := unicodedata.category(each))[0] != "C" else " " * (kind != "Cf") for each in text)
    plain = " ".join(plain.split()).removesuffix(".").strip().lower()
    return plain if any(map(str.isalnum, plain)) else ""


def read_vocabulary(text: str) -> tuple[str, ...]:
    """The words to choose from, as names (`cleaned`), each once.

    text: `default`, those of this package; the name of a data set's class list; a local file with one per line, `#`
    begins a comment; or a JSON list. Raises FileNotFoundError and ValueError where there are none.
    """
    if text in classes.names():
        found = list(classes.read(text).queries)
    else:
        found = _read(text, VOCABULARY, "vocabulary", f"default, {', '.join(classes.names())}, or a file")
    words = dict.fromkeys(filter(None, map(cleaned, found)))
    if not words:
        raise ValueError("vocabulary: expected one word at least, got none; write a word or phrase a line")
    if doubled := len(found) - len(words):
        log.info("vocabulary: %d of %d lines repeat a word or hold none; each is taken once", doubled, len(found))
    return tuple(words)


def read_block(text: str) -> Block:
    """The block-list that an option means: `default`, that of this package; `none`; a local file with a word or phrase
    a line, where `#` begins a comment; or a JSON list. Raises FileNotFoundError and ValueError."""
    return Block(_entries(text))


def settle(vocabulary: str, block: str) -> tuple[str, str]:
    """Both lists without any file: `default`, `none` and names of class lists stay, all else becomes a JSON list.

    Raises what `read_vocabulary` and `read_block` raise, and ValueError where every word is blocked.
    """
    if block not in ("default", "none"):
        block = json.dumps(_entries(block), ensure_ascii=False)
    if vocabulary == "default" and block in ("default", "none"):  # of which no word is blocked
        return vocabulary, block
    words = check_vocabulary(read_vocabulary(vocabulary), read_block(block))
    if vocabulary != "default" and vocabulary not in classes.names():
        vocabulary = json.dumps(words, ensure_ascii=False)
    return vocabulary, block


def check_vocabulary(words: tuple[str, ...], block: Block) -> tuple[str, ...]:
    """The words. Raises ValueError where the block-list leaves none of them."""
    if all(map(block, words)):
        raise ValueError("vocabulary: each of its words is blocked; add others or change the block-list")
    return words


def _entries(text: str) -> list[str]:
    if text == "none":
        return []
    found = list(dict.fromkeys(_read(text, BLOCKED, "block", "default, none, or a file")))
    if wordless := [entry for entry in found if not _words(entry)]:
        raise ValueError(f"block: expected words or phrases, got {wordless[0]!r}; take it out")
    if not found:
        raise ValueError("block: expected one word or phrase at least, got none; none blocks nothing")
    return found


def _read(text: str, default: Path, option: str, expected: str) -> list[str]:
    """The lines of a file, or the texts of a JSON list."""
    if text.startswith("["):
        return json_list(text, option=option)
    file = default if text == "default" else Path(text).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        text = f"there is no file {text!r}; expected {expected} with a word or phrase a line"
        raise FileNotFoundError(f"{option}: {text}") from error
    except (OSError, UnicodeDecodeError) as error:
        text = f"{file} cannot be read as a text in UTF-8 ({one_line(error)})"
        raise ValueError(f"{option}: {text}; expected a word or phrase a line") from error
    return [plain for line in lines if (plain := " ".join(line.partition("#")[0].split()))]


def _joined(*notes: str) -> str:
    return ",".join(dict.fromkeys(word for note in notes for word in note.split(",") if word))


def _words(text: str) -> list[str]:
    """The words of a text as they are compared: without case, accents, possessive and plural."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(each for each in plain if unicodedata.category(each) not in ("Mn", "Cf"))  # accents, soft hyphens
    return [_singular(word) for word in re.findall(r"[^\W_]+", re.sub(r"['’]s\b", "", plain))]


def _singular(word: str) -> str:
    """What a word and its plural have in common; no word itself where that ends in s."""
    return next((word.removesuffix(end) + rest for end, rest in _PLURALS.items() if word.endswith(end)), word)


_PLURALS = {"sses": "s", "shes": "sh", "ches": "ch", "ies": "y", "ie": "y", "men": "man", "s": ""}
# Words for people, by what these are plainly called.
_PEOPLE = {
    word: noun
    for noun, texts in {
        "man": "man guy gentleman male dude lad husband father dad grandfather grandpa son brother uncle groom "
        "businessman policeman fireman salesman cowboy waiter monk priest king prince actor",
        "woman": "woman lady female wife wives housewife housewives mother mom grandmother grandma daughter sister "
        "aunt bride businesswoman policewoman waitress nun queen princess actress maid",
        "boy": "boy schoolboy",
        "girl": "girl schoolgirl",
        "child": "child children grandchild grandchildren kid baby toddler infant newborn",
        "people": "people crowd family couple folk population community tribe gang mob audience",
        "person": "person human adult teenager teen youth individual someone citizen resident tourist traveler "
        "traveller pedestrian passenger spectator worker employee owner boss manager farmer driver rider cyclist "
        "motorcyclist player athlete runner swimmer skier snowboarder surfer skater skateboarder climber hiker diver "
        "golfer goalkeeper referee wrestler gymnast dancer singer musician guitarist drummer pianist violinist "
        "conductor clown magician artist painter sculptor photographer model performer student pupil teacher "
        "professor doctor surgeon dentist nurse patient scientist engineer astronaut lawyer judge politician "
        "president minister leader officer cop police soldier guard knight warrior fighter firefighter lifeguard "
        "hunter fisherman gardener carpenter mechanic welder electrician plumber sailor pilot attendant carrier chef "
        "cook baker butcher barber hairdresser tailor vendor seller shopkeeper cashier customer servant protester "
        "friend neighbor neighbour stranger face body thief thieves beggar slave immigrant migrant refugee prisoner",
    }.items()
    for text in texts.split()
    for word in _words(text)
}
# Words that end a phrase: what stands before them does not belong to what follows.
_ENDS = set(
    _words(
        "of in on at with without by for from to near under over behind beside between into onto through against "
        "around is are was were be has have had who whom whose that which while as the a an his her their its this "
        "these those look sitting standing walking sleeping lying laying holding wearing looking riding running "
        "playing smiling posing talking eating drinking begging living working crying kneeling waiting making taking "
        "doing using carrying praying dancing singing fighting celebrating protesting kissing hugging smoking shouting"
    )
)
# Words that are passed over within a phrase.
_LINKS = set(
    _words(
        "and or very so young old elderly aged little big tall short one two three four five six seven eight nine ten "
        "several many few some other another happy sad angry lonely tired pregnant blond blonde typical"
    )
)
_JOINS = ("and", "or")  # what stands before these qualifies nothing behind them
