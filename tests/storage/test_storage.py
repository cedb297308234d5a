"""Locations of every kind: what they mean, how they are read, and how files are written whole."""

import errno
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pyarrow import fs as pafs

from raypipe import storage
from raypipe.storage import Location
from raypipe.types import BadImage

S3 = "s3://user:secret@bucket/a b#c%20d?e.jpg?endpoint_override=http://127.0.0.1:1&region=us-east-1&scheme=http"


def kind_of(location: str, **limits) -> BadImage:
    with pytest.raises(BadImage) as caught:
        storage.read_bytes(location, **{"max_bytes": 1000} | limits)
    assert caught.value.stage == "fetch"
    return caught.value


@pytest.fixture
def web():
    """A web server on loopback: the path says how it answers. Gives its address and the paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name = self.path.strip("/").partition("?")[0]
            fails_twice = name == "flaky" and asked.count(self.path) < 3
            status = 503 if fails_twice else int(name) if name.isdigit() else 200
            self.send_response(status)
            self.end_headers()  # no length: the size is known only at the end
            self.wfile.write(b"x" * (5000 if name == "large" else 10))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_object_keys_are_taken_raw_and_options_are_not_part_of_them():
    filesystem, path = storage.resolve(S3)
    assert filesystem.type_name == "s3" and path == "bucket/a b#c%20d?e.jpg"


def test_file_systems_are_kept_per_place():
    assert storage.resolve(S3)[0] is storage.resolve(S3.replace("c%20d", "other"))[0]
    assert storage.resolve(S3)[0] is not storage.resolve(S3.replace("us-east-1", "eu-west-1"))[0]


def test_local_paths_become_absolute_and_only_file_uris_are_decoded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.resolve("a%20b/../c.jpg")[1] == str(tmp_path / "c.jpg")
    assert storage.normalise("a%20b.jpg") == str(tmp_path / "a%20b.jpg")
    assert storage.normalise("file:///x/a%20b.jpg") == "/x/a b.jpg"
    assert storage.normalise("~/x.jpg") == "/home/someone/x.jpg"


def test_the_id_holds_no_credentials_and_tables_no_queries():
    assert storage.normalise(S3) == str(Location(S3)) == "s3://bucket/a b#c%20d?e.jpg"
    web = "https://me:pw@host.org/i.jpg?id=7&token=t#top"
    assert storage.normalise(web) == "https://host.org/i.jpg?id=7&token=t"
    assert str(Location(web)) == "https://host.org/i.jpg"
    assert (
        storage.normalise("abfs://box:pw@account.dfs.core.windows.net/x") == "abfs://box@account.dfs.core.windows.net/x"
    )


def test_names_that_are_no_text_are_quoted_and_found_again(tmp_path):
    path = os.path.join(tmp_path, os.fsdecode(b"caf\xe9 100%.jpg"))
    with open(path, "wb") as file:
        file.write(b"content")
    location = storage.normalise(path)
    assert location == f"file://{tmp_path}/caf%E9%20100%25.jpg" and storage.normalise(location) == location
    assert storage.read_bytes(location, max_bytes=100) == b"content"


@pytest.mark.parametrize("uri", ["nonsense://bucket/x", "s3://user:secret@bucket/x?endpoint_override=%"])
def test_what_cannot_be_reached_is_an_error_without_secrets(uri):
    with pytest.raises((ValueError, BadImage)) as caught:
        storage.read_bytes(uri, max_bytes=1)
    assert "secret" not in str(caught.value)
    assert caught.value.kind in ("invalid", "network")


def test_parts_of_files_are_read(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    location = str(tmp_path / "x")
    assert storage.read_bytes(location, max_bytes=10) == b"0123456789"
    assert storage.read_bytes(location, start=2, length=3, max_bytes=3) == b"234"
    assert storage.read_bytes(location, start=8, max_bytes=3) == b"89"
    assert kind_of(location, start=8, length=3).kind == "truncated"
    assert kind_of(location, max_bytes=9).kind == "too_large"
    assert kind_of(location, start=2, length=3, max_bytes=2).kind == "too_large"


def test_what_is_no_file_ends_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        for path in (tmp_path, tmp_path / "fifo", tmp_path / "s", "/dev/zero"):
            assert kind_of(str(path)).kind == "not_a_file"
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "none", tmp_path / "loop", tmp_path / "file" / "none", tmp_path / ("a" * 300)):
        error = kind_of(str(path))
        assert error.kind == "missing"
    assert kind_of("/tmp/null\0character").kind == "invalid"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_says_so(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    (tmp_path / "x").chmod(0)
    assert kind_of(str(tmp_path / "x")).kind == "permission"


@pytest.mark.parametrize("fails", [2, 3])
def test_transient_errors_are_tried_three_times(fails, tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"content")
    calls, stat = [], os.stat

    def flaky(path, **kwargs):
        if str(path) == str(tmp_path / "x"):
            calls.append(path)
            if len(calls) <= fails:
                raise OSError(errno.ESTALE, "stale file handle")
        return stat(path, **kwargs)

    monkeypatch.setattr(os, "stat", flaky)
    if fails == 2:
        assert storage.read_bytes(str(tmp_path / "x"), max_bytes=100) == b"content"
    else:
        error = kind_of(str(tmp_path / "x"))
        assert error.kind == "io" and "stale" in error.message
    assert len(calls) == 3


def test_web_addresses_are_read_up_to_the_limit(web):
    address, asked = web
    assert storage.read_bytes(f"{address}/photo?id=1", max_bytes=10) == b"x" * 10
    assert kind_of(f"{address}/large").kind == "too_large"
    assert asked == ["/photo?id=1", "/large"]  # one request each


@pytest.mark.parametrize(
    ("status", "kind"), [(404, "missing"), (410, "missing"), (401, "permission"), (403, "permission")]
)
def test_final_web_answers_are_not_tried_again(status, kind, web):
    address, asked = web
    error = kind_of(f"{address}/{status}?token=secret")
    assert (error.kind, len(asked)) == (kind, 1)
    assert "secret" not in str(error)


def test_web_servers_in_trouble_are_asked_three_times(web):
    address, asked = web
    assert storage.read_bytes(f"{address}/flaky", max_bytes=10) == b"x" * 10
    error = kind_of(f"{address}/500?token=secret")
    assert error.kind == "network" and "secret" not in str(error)
    assert len(asked) == 6


def test_other_file_systems_come_through_fsspec():
    import fsspec

    fsspec.filesystem("memory").pipe("/photos/a b.jpg", b"0123456789")
    assert storage.read_bytes("memory://photos/a b.jpg", start=2, length=3, max_bytes=10) == b"234"
    assert kind_of("memory://photos/a b.jpg", max_bytes=9).kind == "too_large"
    assert kind_of("memory://photos/none.jpg").kind == "missing"


def test_put_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    filesystem, path = storage.resolve(str(tmp_path / "x.gz"))
    assert storage.is_local(filesystem)
    for content in (b"first", b"second, longer"):
        storage.put(filesystem, path, content)
        assert (tmp_path / "x.gz").read_bytes() == content
        assert os.listdir(tmp_path) == ["x.gz"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")]
)
def test_a_failed_put_keeps_the_old_file_and_says_what_to_do(step, number, advice, tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"old")

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=advice) as caught:
        storage.put(pafs.LocalFileSystem(), str(tmp_path / "x"), b"new")
    assert caught.value.errno == number and str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"old"


def test_a_rename_that_happened_but_was_reported_as_failed_counts(tmp_path, monkeypatch):
    replace = os.replace

    def as_on_nfs(source, target):
        replace(source, target)
        raise FileNotFoundError(errno.ENOENT, "no such file")

    monkeypatch.setattr(os, "replace", as_on_nfs)
    storage.put(pafs.LocalFileSystem(), str(tmp_path / "x"), b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_put_into_a_missing_folder_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        storage.put(pafs.LocalFileSystem(), str(tmp_path / "nowhere" / "x"), b"new")
