"""What of this machine a process may use: its CPU cores, its GPU."""

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


def device_here(device: str, *, gpus: float) -> str:
    """cpu or cuda for work in this process. device: auto, cpu or cuda. gpus: 0 for work that can use none.

    Raises ValueError for cuda where there is none.
    """
    if not gpus or device == "cpu":
        return "cpu"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device on this machine; --device cpu does without")
    return "cuda" if torch.cuda.is_available() else "cpu"
