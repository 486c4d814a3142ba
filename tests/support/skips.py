"""The reasons for which a test may be skipped in continuous integration.

With ``SEG_STRICT_SKIPS=1``, as .ci/run sets it, a skip for any other reason makes the run fail.
"""

import os
import platform
import re
import shutil
import sys
from typing import NamedTuple

HAS_NVCC = shutil.which("nvcc", path=f"{os.environ.get('PATH')}:/usr/local/cuda/bin") is not None
X86_64_LINUX = sys.platform == "linux" and platform.machine() == "x86_64"


class Allowed(NamedTuple):
    """A pattern that a reason matches in full, why the skip is allowed, and on which machines."""

    pattern: str
    why: str
    here: bool = True


ALLOWED = (
    Allowed(
        r"no GPU to test on: .*",
        "Without a GPU, tests/cuda runs the kernels on the host; gpu_check.sh runs these tests.",
    ),
    Allowed(
        r"there is a GPU( here)?|says what is said without a GPU",
        "These tests check errors and defaults that a machine with a GPU does not have.",
    ),
    Allowed(
        r"developer data set absent: .*",
        "The data set is not part of the project. With SEG_DATA set, this skip is a failure.",
        not os.environ.get("SEG_DATA"),
    ),
    Allowed(
        r"root (reads every file|writes everywhere)",
        "Root may write to every file, so that these tests of permissions need another user.",
    ),
    Allowed(
        r"this user cannot make a device here: .*",
        "Some containers forbid to make a device file, even for root.",
    ),
    Allowed(
        r"no nvcc|runtime\._cuda is not built",
        "A machine without the CUDA toolkit compiles no kernels; tests/cuda runs them on the host.",
        not HAS_NVCC,
    ),
    Allowed(
        r"the table is of nvcc .*; here is .*",
        "Another nvcc gives kernels other registers; the table holds for one version only.",
    ),
    Allowed(
        r"no chromium \(Debian package\)",
        "The latency page is opened in a browser only where the machine has one.",
    ),
    Allowed(
        r"needs 8 GiB of memory",
        "The test fills more memory than a small machine has.",
    ),
    Allowed(
        r"labels were recorded on x86-64",
        "Other processors round differently; their results are compared with the reference.",
        platform.machine() != "x86_64",
    ),
    Allowed(
        r"TensorRT for RTX .*|pip install ('dynaguide-edge\[rtx\]'|tensorrt-rtx-cu13)"
        r"|tensorrt_rtx is not installed|its version is in the keys|it is asked .*"
        r"|needs TensorRT for RTX, the builder",
        "NVIDIA publishes TensorRT for RTX for Linux on x86-64 only.",
        not X86_64_LINUX,
    ),
)


def is_allowed(reason, allowed=ALLOWED):
    """Tell whether a test may be skipped for this reason on this machine."""
    return any(row.here and re.fullmatch(row.pattern, reason, re.DOTALL) for row in allowed)


class StrictSkips:
    """A plugin of pytest that makes a run fail when a test is skipped for an unknown reason."""

    def __init__(self):
        self.unknown = {}  # reason -> tests that were skipped for it

    def note(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            if not is_allowed(reason):
                self.unknown.setdefault(reason, []).append(report.nodeid)

    pytest_runtest_logreport = pytest_collectreport = note

    def pytest_sessionfinish(self, session):
        if self.unknown and session.exitstatus in (0, 5):  # 5: no test was collected
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter):
        if self.unknown:
            terminalreporter.section("skips that are not allowed", red=True)
        for reason, tests in sorted(self.unknown.items()):
            first = f"{tests[0]} and {len(tests) - 1} more" if tests[1:] else tests[0]
            terminalreporter.line(f"{first}: {reason}")
            terminalreporter.line(
                "  fix: run the test, or add the reason to tests/support/skips.py"
            )
