"""In a process of its own, since what is asked of the C library stays for all of a process's life."""

import os
import platform
import subprocess
import sys

PROGRAM = """
import resource
from sparse_lm.host_memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take = lambda: bytearray(2**25)
take()
before = faults()
for _ in range(10):
    take()
print((faults() - before) * resource.getpagesize() / 2**25)
"""


def taken_anew(keep, platforms=""):
    """How many of ten arrays of 32 MB, each freed before the next, the system hands out anew."""
    run, environment = [sys.executable, "-c", PROGRAM.format(keep=keep)], os.environ | {"JAX_PLATFORMS": platforms}
    return float(subprocess.run(run, capture_output=True, check=True, text=True, env=environment).stdout)


def test_freed_memory_is_used_again():
    assert taken_anew(keep=True) < 1
    if platform.libc_ver()[0] == "glibc":
        assert taken_anew(keep=False) > 5
        assert taken_anew(keep=True, platforms="tpu,cpu") > 5 and taken_anew(keep=True, platforms="cpu,tpu") < 1
