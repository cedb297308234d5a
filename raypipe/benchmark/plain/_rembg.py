"""What `rembg p -om -m u2net FOLDER OUTPUT` does, for an installation of rembg without its command."""

from __future__ import annotations

import sys
from pathlib import Path


def main(folder: str, output: str) -> None:
    """Write the mask of each image of a folder as a PNG file."""
    from rembg import new_session, remove

    session = new_session("u2net")
    Path(output).mkdir(parents=True)
    for file in sorted(Path(folder).iterdir()):
        mask = remove(file.read_bytes(), session=session, only_mask=True)
        Path(output, file.name).with_suffix(".png").write_bytes(mask)


if __name__ == "__main__":
    main(*sys.argv[1:])
