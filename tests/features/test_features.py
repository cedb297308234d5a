"""The room of features: its example, and that looking into it costs nothing."""

import doctest
import subprocess
import sys

from raypipe import features, lookup


def test_the_example_runs():
    result = doctest.testmod(features)
    assert result.attempted and not result.failed


def test_importing_the_room_imports_no_heavy_library():
    names = ", ".join(f"raypipe.features.{name}" for name in lookup.modules(features.__path__))
    code = f"import sys, {names}; print({{'torch', 'ray', 'cv2', 'scipy', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
