"""A file of options, one flat line each, as `--config` takes it."""

from __future__ import annotations

import re

import yaml

from raypipe import storage
from raypipe.types import BadImage

MOST_BYTES = 1 << 20  # of the file; options take a few hundred


class Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, which YAML 1.1 takes for text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read(place: str) -> dict:
    """The options in a YAML file by name. place: a path or a URI. Raises ValueError, without the file's name."""
    try:
        values = yaml.load(_content(place).decode(), Loader) or {}
    except OSError as error:
        raise ValueError(error.strerror) from error
    except BadImage as error:
        raise ValueError(error.message) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid YAML: {error}") from error
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise ValueError("expected flat lines such as `batch_size: 8`, one option each")
    return values


def _content(place: str) -> bytes:
    path = storage.local_path(place)
    if path is None:
        return storage.read_bytes(place, max_bytes=MOST_BYTES)
    with open(path, "rb") as file:  # also a pipe, such as <(...) of a shell
        return file.read()
