"""Archives as `raypipe archive` leaves them, without CLIP. Shared by tests."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa

from raypipe.inputs import archives
from raypipe.inputs.items import Item, manifest_of
from raypipe.storage import Folder, Location


def make(folder, images: Mapping[str, Iterable]) -> Path:
    """Write an archive: for each category the paths of its images, best first; scores fall by 1/100 with the rank."""
    entries = [(category, rank, Path(path)) for category, its in images.items() for rank, path in enumerate(its)]
    manifest = manifest_of(Item(Location(str(path)), path.name) for _, _, path in entries)[0].read()
    rows = {row["location"]: row for row in manifest.to_pylist()}
    members = [
        {"category": category, "rank": rank, "score": 0.3 - rank / 100}
        | {name: rows[str(path)][name] for name in ("image_id", "key", "uri")}
        for category, rank, path in entries
    ]
    settings = {"source": "", "classes": [{"name": name, "query": name} for name in images]}
    archives.write(Folder(str(folder)), settings, pa.Table.from_pylist(members, schema=archives.MEMBERS), manifest, {})
    return Path(folder)
