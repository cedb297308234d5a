"""Walking folders: links, loops, special files and other file systems."""

import os
from collections import Counter

from raypipe.inputs.folders import walk


def test_walking_follows_links_once_and_ends_on_loops(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for path in (
        inside / "b" / "1.jpg",
        inside / "b.jpg",
        inside / "_ours" / "2.jpg",
        inside / ".h.jpg",
        outside / "3.jpg",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (inside / "b" / "up").symlink_to(inside)
    (outside / "back").symlink_to(inside)
    (outside / "self").symlink_to(outside)
    (inside / "linked").symlink_to(outside)
    (inside / "twice").symlink_to(outside)
    (inside / "file.jpg").symlink_to(outside / "3.jpg")
    (inside / "broken.jpg").symlink_to("nowhere")
    os.mkfifo(inside / "fifo")
    skipped = Counter()
    assert list(walk(str(inside), skipped)) == ["b.jpg", "b/1.jpg", "file.jpg", "linked/3.jpg"]
    assert skipped == {"hidden names": 2, "links to folders listed elsewhere": 4, "broken links and special files": 2}


def test_walking_works_through_fsspec():
    import fsspec

    for key in ("b/c.jpg", "a b.jpg", ".hidden.jpg"):
        fsspec.filesystem("memory").pipe(f"/walked/{key}", b"x")
    skipped = Counter()
    assert list(walk("memory://walked", skipped)) == ["a b.jpg", "b/c.jpg"]
    assert skipped == {"hidden names": 1}
