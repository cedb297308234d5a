"""A server that speaks as much of the Hugging Face Hub's protocol as fetching a model needs, on loopback."""

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    folder: Path
    licence: str | None = "apache-2.0"  # as the model card names it
    gated: bool = False
    sizes: dict[str, int] = field(default_factory=dict)  # claimed instead of the true sizes, by file
    break_at: int | None = None  # bytes after which the first answer with a large file ends

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def size(self, file: str) -> int:
        return self.sizes.get(file, (self.folder / file).stat().st_size)


@dataclass
class Hub:
    address: str
    repositories: dict[str, Repository]  # by id
    served: list[str]  # files whose content was sent, in order


@contextmanager
def hub(repositories: dict[str, Repository]):
    """Serve the repositories; gives the Hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories, [])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(with_content=False)

    def do_GET(self):
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool):
        words = urlsplit(self.path).path.strip("/").split("/")
        is_api = words[:2] == ["api", "models"]
        words = words[2:] if is_api else words
        repository = self.server.hub.repositories.get("/".join(words[:2]))
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        verb, revision, rest = (words[2:] + ["revision", "main"])[0], (words[3:] + ["main"])[0], "/".join(words[4:])
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if is_api:
            return self._json(
                self._tree(repository) if verb == "tree" else self._model("/".join(words[:2]), repository)
            )
        if repository.gated:
            return self._refuse(403, "GatedRepo")
        if rest not in repository.files():
            return self._refuse(404, "EntryNotFound")
        self._file(repository, rest, with_content)

    def _model(self, name: str, repository: Repository) -> dict:
        tags = ["transformers"] + ([f"license:{repository.licence}"] if repository.licence else [])
        siblings = [{"rfilename": file, "size": repository.size(file)} for file in repository.files()]
        card = {"license": repository.licence} if repository.licence else {}
        return {"id": name, "modelId": name, "sha": COMMIT, "tags": tags, "siblings": siblings, "cardData": card}

    def _tree(self, repository: Repository) -> list[dict]:
        entries = []
        for file in repository.files():
            content = (repository.folder / file).read_bytes()
            entries.append({"type": "file", "path": file, "size": len(content), "oid": sha1(content).hexdigest()})
        return entries

    def _file(self, repository: Repository, file: str, with_content: bool):
        content = (repository.folder / file).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not with_content:
            return
        self.server.hub.served.append(file)
        if repository.break_at and len(content) > repository.break_at:
            self.wfile.write(content[start : start + repository.break_at])
            repository.break_at, self.close_connection = None, True
        else:
            self.wfile.write(content[start:])

    def _json(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, code: str):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
