"""The memory that steps on a CPU take and give back."""

import ctypes
import platform

# Of mallopt in glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tells the C library to keep freed memory for this process's next allocation.

    A step allocates and frees the same large arrays over and over. By default each goes back to the system, which then
    hands out and clears every page anew: a quarter of a step's time. Threads that run already keep their ways, so it
    has to be called before jax looks for devices: the commands do, and a program of one's own may. Does something with
    glibc alone.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((TRIM_THRESHOLD, -1), (MMAP_MAX, 0), (ARENA_MAX, 1)):
            mallopt(parameter, value)
