"""Permissions that bind a test although root runs it."""

import ctypes
import os
import sys
from contextlib import contextmanager

_OVERRIDES = 0b110  # the capabilities CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
_VERSION = 0x20080522  # of capget's and capset's structures
_LIBC = ctypes.CDLL(None, use_errno=True)  # now, because a test may replace ctypes.CDLL


@contextmanager
def obeyed():
    """In the block, this thread and the threads that it starts have no right to ignore the
    permissions of files. A process that they start has it again."""
    if sys.platform != "linux" or os.geteuid() != 0:
        yield
        return
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the upper halves
    assert _LIBC.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    before = sets[0]
    sets[0] = before & ~_OVERRIDES
    assert _LIBC.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        sets[0] = before
        assert _LIBC.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
