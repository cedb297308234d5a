"""RAY_ADDRESS: whether a job joins a cluster, and whether one answers there. Imports no Ray before that is clear."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from raypipe.lookup import one_line
from raypipe.storage.uri import SUBMITTED

CONNECT_SECONDS = 5.0  # for a connection to the head
JOIN_SECONDS = 45.0  # for a Ray that joins and leaves, which takes one second on an idle machine
WAYS_OUT = "give HOST:PORT of a running head (its port is 6379 unless told otherwise), or unset RAY_ADDRESS"


def joins_cluster() -> bool:
    """Whether jobs of this process run on a cluster that RAY_ADDRESS names."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def is_elsewhere() -> bool:
    """Whether jobs run on a Ray that is there already: what this machine has says nothing about its workers'."""
    ray = sys.modules.get("ray")
    return joins_cluster() or (ray is not None and ray.is_initialized())


def check() -> None:
    """Raise ValueError unless a cluster answers at RAY_ADDRESS; Ray itself would try for minutes and log all of it."""
    if not joins_cluster() or SUBMITTED in os.environ:  # Ray names itself to a job that was submitted to it
        return
    address = os.environ["RAY_ADDRESS"]
    if address != "auto":
        _connect(address)
    code = "import ray; ray.init(logging_level='fatal', log_to_driver=False)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=JOIN_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"RAY_ADDRESS {address!r}: what answers there is no Ray cluster; {WAYS_OUT}") from None
    if done.returncode:
        why = " ".join(done.stderr.rpartition("\nTraceback ")[2].split("\n")[-2:]).strip()
        raise ValueError(f"RAY_ADDRESS {address!r}: no cluster can be joined there ({why}); {WAYS_OUT}")


def _connect(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if "://" in host and address.startswith("http"):
        text = "is the address of a job server: use it with `ray job submit --address`, or"
        raise ValueError(f"RAY_ADDRESS {address!r} {text} {WAYS_OUT}")
    if not host or "/" in host or not port.isdigit():
        raise ValueError(f"RAY_ADDRESS {address!r}: expected HOST:PORT; {WAYS_OUT}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"RAY_ADDRESS {address!r}: no Ray answers there ({one_line(error)}); {WAYS_OUT}") from None
