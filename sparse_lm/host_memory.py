"""Settings of the C library's memory allocator, for training on a CPU."""

import ctypes
import platform

# Of mallopt in glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Makes the C library keep freed memory for the next allocation of this process. Affects glibc only.

    Each step allocates and frees the same large arrays. By default freed memory returns to the system, which clears
    every page again: a quarter of a step's time. Running threads keep their settings, so call it before jax starts its
    devices, as the commands do.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((TRIM_THRESHOLD, -1), (MMAP_MAX, 0), (ARENA_MAX, 1)):
            mallopt(parameter, value)
