"""An allocator that counts its calls, for tests that loops allocate nothing."""

import os
import shutil
import subprocess
import sys

import pytest

COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
atomic_long allocations;
void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void *malloc(size_t n) { ++allocations; return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { ++allocations; return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { ++allocations; return __libc_realloc(p, n); }
int posix_memalign(void **p, size_t a, size_t n) {
  ++allocations;
  return (*p = __libc_memalign(a, n)) ? 0 : 12;
}
"""


def counting_allocator(folder):
    """Compile the allocator and return the library. A program finds its count with
    ``ctypes.c_long.in_dll(ctypes.CDLL(library), "allocations")``."""
    if "in-qemu" in sys.executable:
        pytest.skip("the C compiler is not for the emulated processor")
    if shutil.which("cc") is None or "LD_PRELOAD" in os.environ:
        pytest.skip("no C compiler for the counting allocator, or another one is preloaded")
    (folder / "count.c").write_text(COUNTER)
    library = folder / "count.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", library, folder / "count.c"]
    subprocess.run(command, check=True)
    return library


def preloaded(library, code):
    """Run a program with the allocator and return what it prints."""
    environment = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=600, check=True, env=environment,
    )  # fmt: skip
    return done.stdout
