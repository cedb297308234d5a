"""Web addresses: who asks for them, what reads them, and where a list may not lead."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import pytest
from support.sources import contents, left_out, listed

from raypipe import storage
from raypipe.inputs.originals import Originals
from raypipe.storage import web


@pytest.fixture
def server():
    """A web server on loopback, by its port, and what it was asked: (path, User-Agent). `/to/URL` leads to the URL."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["User-Agent"]))
            place = self.path.partition("/to/")[2]
            self.send_response(302 if place else 200)
            if place:
                self.send_header("Location", place)
            self.end_headers()
            self.wfile.write(b"a.jpg\n/etc/hosts\nfile:///etc/hosts\n" if self.path.endswith(".txt") else b"picture")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        *((host, False) for host in "127.0.0.1 127.9.9.9 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254".split()),
        *((host, False) for host in "100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 ::1 :: fe80::1%eth0".split()),
        ("64:ff9b::808:808", True),
        *((host, False) for host in "::7f00:1 64:ff9b::7f00:1 ::ffff:0:127.0.0.1 fec0::1".split()),
        *((host, False) for host in "fd00::1 ff02::1 ::ffff:127.0.0.1 2002:7f00:1::".split()),
    ],
)
def test_which_addresses_are_public(host, expected):
    assert web.is_public(host) is expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0x7f.1"])
def test_a_list_leads_into_no_private_network_unless_that_is_allowed(host, server, tmp_path):
    port, asked = server
    (tmp_path / "list.txt").write_text(f"http://{host}:{port}/a.jpg\n")
    (refused,) = contents(tmp_path / "list.txt")
    assert (refused.kind, asked) == ("refused", []) and "--allow-private" in refused.message
    assert contents(tmp_path / "list.txt", allow_private=True) == [b"picture"]


@pytest.mark.parametrize("entry", ["zip://a.jpg::http://HERE/z.zip", "s3://b/a.jpg?endpoint_override=http://HERE"])
def test_no_other_scheme_of_a_list_goes_round_that(entry, server, tmp_path, caplog):
    port, asked = server
    lines = ["a.jpg", entry.replace("HERE", f"127.0.0.1:{port}"), "s3://b/c.jpg?endpoint_override=https://8.8.8.8:9000"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert [row["key"] for row in listed(tmp_path / "list.txt")] == ["a.jpg", "b/c.jpg"] and not asked
    assert any("1 record that may lead into a private network" in reason for reason in left_out(caplog))
    assert len(listed(tmp_path / "list.txt", allow_private=True)) == 3


def test_a_redirect_into_a_private_network_is_refused(server, tmp_path, monkeypatch):
    port, asked = server
    is_public = web.is_public  # 127.0.0.2 stands for a public address
    monkeypatch.setattr(web, "is_public", lambda host: host == "127.0.0.2" or is_public(host))
    (tmp_path / "list.txt").write_text(
        f"http://127.0.0.2:{port}/a.jpg\nhttp://127.0.0.2:{port}/to/http://127.0.0.1:{port}/secret\n"
    )
    good, refused = contents(tmp_path / "list.txt")
    assert good == b"picture" and refused.kind == "refused"
    assert not any("secret" in path for path, _ in asked if "/to/" not in path)


def test_an_address_given_as_the_input_is_the_choice_of_its_user(server, tmp_path):
    port, _ = server
    assert contents(f"http://127.0.0.1:{port}/a.jpg") == [b"picture"]
    assert contents(f"http://127.0.0.1:{port}/list.txt") == [b"picture"]  # what lies beside it, too


def test_a_list_from_elsewhere_leads_to_no_file_here(server, caplog):
    port, _ = server
    source = f"http://127.0.0.1:{port}/list.txt"
    assert [row["location"] for row in listed(source)] == [f"http://127.0.0.1:{port}/a.jpg"]
    assert any("2 records of a list from elsewhere" in reason and "line 2" in reason for reason in left_out(caplog))
    assert len(listed(source, allow_private=True)) == 2  # the file is named twice


def test_a_list_in_a_bucket_may_name_a_shared_mount_but_no_file_uri(tmp_path, caplog):
    import fsspec

    (tmp_path / "a.jpg").write_bytes(b"picture")
    lines = [
        f"{tmp_path}/a.jpg",
        f"file://{tmp_path}/a.jpg",
        f"local://{tmp_path}/a.jpg",
        f"zip://a::file://{tmp_path}/z",
    ]
    fsspec.filesystem("memory").pipe("/lists/all.txt", "\n".join(lines).encode())
    assert contents("memory://lists/all.txt") == [b"picture"]
    assert any("3 records of a list from elsewhere" in reason and "line 2" in reason for reason in left_out(caplog))


def test_originals_are_not_asked_for_in_a_private_network_unless_that_is_allowed(server):
    port, asked = server
    row = {"image_id": "1", "key": "a.jpg", "uri": f"http://127.0.0.1:{port}/a.jpg", "sha256": ""}
    ((_, refused),) = Originals().fetch([row])
    assert (refused.kind, asked) == ("refused", [])
    ((_, found),) = Originals(allow_private=True).fetch([row])
    assert found.kind == "changed" and len(asked) == 1


def test_requests_bear_the_name_of_raypipe(server):
    port, asked = server
    storage.read_bytes(f"http://127.0.0.1:{port}/a.jpg", max_bytes=100)
    assert asked[0][1].startswith(f"raypipe/{version('raypipe')} ")


def test_an_address_is_one_address_whatever_stands_in_it(server):
    port, asked = server
    assert storage.read_bytes(f"http://127.0.0.1:{port}/a::file:///etc/hosts", max_bytes=100) == b"picture"
    assert asked[0][0] == "/a::file:///etc/hosts"


@pytest.mark.parametrize(("scheme", "library"), [("https", "aiohttp"), ("sftp", "paramiko")])
def test_a_reader_without_its_library_is_one_error_at_the_start(scheme, library, tmp_path):
    (tmp_path / "list.txt").write_text(f"a.jpg\n{scheme}://example.org/a.jpg\n")
    words = ["label", "kmeans", "--input", str(tmp_path / "list.txt"), "--output", str(tmp_path / "run"), "--local"]
    program = f"import sys; sys.modules[{library!r}] = None; from raypipe.cli import main; sys.exit(main({words!r}))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 2 and f"{scheme}:// cannot be read here" in ended.stderr and library in ended.stderr
    assert "Traceback" not in ended.stderr and not (tmp_path / "run").exists()
