"""A function called in a Python process of its own: a crash stays there, and the environment is another one."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

CALL = (
    "import pickle, sys; from pathlib import Path; folder = Path(sys.argv[1]);"
    "function, arguments = pickle.loads((folder / 'call').read_bytes());"
    "(folder / 'result').write_bytes(pickle.dumps(function(*arguments)))"
)


class Child:
    """The call, begun. A context: a child that still runs at its end is ended. environment: all of its variables."""

    def __init__(self, environment: dict[str, str], function: Callable, *arguments):
        self._kept = tempfile.TemporaryDirectory(prefix="raypipe-child-")
        self._folder = Path(self._kept.name)  # files, not stdin and stdout: libraries print there
        (self._folder / "call").write_bytes(pickle.dumps((function, arguments)))
        with open(self._folder / "log", "wb") as log:
            command = [sys.executable, "-c", CALL, str(self._folder)]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        self._kept.cleanup()

    def result(self, timeout: float | None = None):
        """What the function returned. Raises RuntimeError with its last words, and TimeoutError after `timeout` s."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error
        file, words = self._folder / "result", (self._folder / "log").read_text(errors="replace").strip()
        if not file.exists():
            *_, last = words.split("\n")
            raise RuntimeError(f"its process ended with {code}: {last}")
        return pickle.loads(file.read_bytes())
