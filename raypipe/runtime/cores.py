"""What of this machine a process may use: its CPU cores, its memory, its GPUs."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass

from raypipe.networks import cores as count


def for_local_ray() -> int:
    """Logical CPUs of a local Ray: two above the cores, since actors on every CPU would leave none for reading."""
    return max(4, count() + 2)


def actors(cpus: int, *, gpus: float = 0.0, per_actor: float = 0.0) -> int:
    """Actors of a job on one machine: one per core, or as many as its GPUs hold. Two CPUs are for reading and writing.

    cpus: logical ones of its Ray. gpus: those it has. per_actor: GPUs of an actor; 0 for work that uses none.
    """
    return max(1, min(int(gpus / per_actor), cpus - 2) if per_actor else cpus - 2)


def memory() -> int:
    """Bytes of memory that this process may use, its container's limit included."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:  # bytes, or "max"
        total = min(total, int(file.read()))
    return total


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU that this process may use."""

    name: str
    memory: int  # bytes


def gpus() -> tuple[str, list[Gpu]]:
    """The newest CUDA that the NVIDIA driver knows, as in "12.4", and its GPUs. ("", []) without a driver.

    Asks the driver itself: torch would take seconds to import, and cannot say why it finds none.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "", []
    number, found = ctypes.c_int(), []
    driver.cuDriverGetVersion(ctypes.byref(number))
    known = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number)):  # not 0: no GPU, or none that is allowed
        return known, []
    for i in range(number.value):
        device, name, size = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        driver.cuDeviceGet(ctypes.byref(device), i)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        found.append(Gpu(name.value.decode(errors="replace"), size.value))
    return known, found


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
