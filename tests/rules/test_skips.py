"""A run with SEG_STRICT_SKIPS=1 fails when a test is skipped for a reason that is not listed."""

import os
import re
import subprocess
import sys

from cases import case
from skips import ALLOWED, Allowed, is_allowed
from source_rules import ROOT

ALLOWED_SKIPS = """
import pytest

def test_known(): pytest.skip("no GPU to test on: no driver")
def test_data(): pytest.skip("developer data set absent: set SEG_DATA=/path/to/data")
def test_xfail(): pytest.xfail("it is known to fail")
def test_passes(): pass
"""
OTHER_SKIPS = """
import pytest

def test_known(): pytest.skip("no GPU to test on: no driver")
def test_call(): pytest.skip("it is Monday")
def test_again(): pytest.skip("it is Monday")
def test_package(): pytest.importorskip("a_package_that_is_absent", reason="needs a package")
@pytest.mark.skip(reason="it is slow")
def test_mark(): pass
@pytest.mark.parametrize("x", [])
def test_empty(x): pass
"""
OF_A_MODULE = 'import pytest\npytest.importorskip("a_package_that_is_absent", reason="for all")\n'


def run(folder, tests, **variables):
    """Run files of tests with this suite's conftest.py; return exit status and output."""
    (folder / "tests").mkdir(parents=True)
    for name in ("conftest.py", "support"):
        (folder / "tests" / name).symlink_to(ROOT / "tests" / name)
    for name, text in tests.items():
        (folder / "tests" / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", folder / "tests"]
    command += ["-c", ROOT / "pyproject.toml", "--rootdir", folder]
    mine = {k: v for k, v in os.environ.items() if k not in ("SEG_DATA", "PYTEST_ADDOPTS")}
    done = subprocess.run(command, cwd=ROOT, env=mine | variables, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_unknown_reasons_fail_and_are_named(tmp_path):
    tests = {"test_a": OTHER_SKIPS, "test_b": OF_A_MODULE}
    status, output = run(tmp_path, tests, SEG_STRICT_SKIPS="1")
    assert status == 1, output
    named = output.partition("skips that are not allowed")[2]
    for line in (
        "tests/test_a.py::test_call and 1 more: it is Monday",
        "tests/test_a.py::test_package: needs a package",
        "tests/test_a.py::test_mark: it is slow",
        r"tests/test_a.py::test_empty\[.*\]: got empty parameter set.*",
        "tests/test_b.py: for all",
    ):
        with case(line):
            assert re.search(f"^{line}\n  fix: ", named, re.MULTILINE), output
    assert named.count("  fix: ") == 5


def test_listed_reasons_pass_and_missing_data_fails_where_data_was_promised(tmp_path):
    tests = {"test_a": ALLOWED_SKIPS}
    status, output = run(tmp_path / "without", tests, SEG_STRICT_SKIPS="1")
    assert status == 0 and "not allowed" not in output, output
    status, output = run(tmp_path / "with", tests, SEG_STRICT_SKIPS="1", SEG_DATA=str(tmp_path))
    assert status == 1 and "tests/test_a.py::test_data: developer data set absent" in output


def test_without_the_variable_every_reason_passes(tmp_path):
    status, output = run(tmp_path, {"test_a": OTHER_SKIPS}, SEG_STRICT_SKIPS="0")
    assert status == 0 and "not allowed" not in output, output


def test_ci_asks_for_strict_skips():
    assert "SEG_STRICT_SKIPS=1 make test\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_each_row_says_why_and_holds_on_its_machines_only():
    for row in ALLOWED:
        with case(row.pattern):
            re.compile(row.pattern)
            assert row.why.endswith(".") and " " in row.why
    rows = [Allowed("no (cat|dog)", "Pets.", True), Allowed("x", "Elsewhere.", False)]
    assert is_allowed("no cat", rows) and is_allowed("no dog", rows)
    assert not is_allowed("no cat at all", rows) and not is_allowed("x", rows)
