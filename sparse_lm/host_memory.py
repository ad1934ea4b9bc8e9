"""Settings of the C library's memory allocator, for training on a CPU."""

import ctypes
import importlib.util
import os
import platform
from importlib import metadata

# Of mallopt in glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Makes the C library keep freed memory for the next allocation of this process. Affects glibc only.

    Each step allocates and frees the same large arrays. By default freed memory returns to the system, which clears
    every page again: a quarter of a step's time. Running threads keep their settings, so call it before jax starts its
    devices, as the commands do. Does nothing where jax will not compute on the CPU.
    """
    if platform.libc_ver()[0] == "glibc" and _computes_on_cpu():
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((TRIM_THRESHOLD, -1), (MMAP_MAX, 0), (ARENA_MAX, 1)):
            mallopt(parameter, value)


def _computes_on_cpu() -> bool:
    """Whether jax will, without starting its devices: as JAX_PLATFORMS says, or where no plugin for others is there."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return importlib.util.find_spec("libtpu") is None and not metadata.entry_points(group="jax_plugins")
