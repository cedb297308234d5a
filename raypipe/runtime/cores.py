"""How many CPU cores this process may use."""

from __future__ import annotations

import os


def count() -> int:
    """Whole cores of this process, its container's quota included; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:  # "quota period" in microseconds, or "max period"
            quota, period = file.read().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):
        return allowed


def for_local_ray() -> int:
    """Logical CPUs of a local Ray: two above the cores, since actors on every CPU would leave none for reading."""
    return max(4, count() + 2)
