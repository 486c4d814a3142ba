"""No source is longer than a reader can keep in mind."""

import subprocess

import pytest
from source_rules import MOST_LINES, ROOT, SUFFIXES, long_files, project_files, relative


def test_no_file_is_long():
    found = {relative(p) for p in project_files(ROOT)}
    assert {"setup.py", "runtime/__init__.py", "runtime/csrc/network.h"} <= found
    assert long_files(ROOT) == []


@pytest.mark.parametrize("with_git", [False, True])
def test_the_rule_sees_long_files(tmp_path, with_git):
    for suffix in SUFFIXES:
        (tmp_path / f"long{suffix}").write_text("\n" * (MOST_LINES + 1))
        (tmp_path / f"right{suffix}").write_text("\n" * MOST_LINES)
    (tmp_path / "long.json").write_text("\n" * 2 * MOST_LINES)
    (tmp_path / "build").mkdir()
    (tmp_path / "build/long.py").write_text("\n" * 2 * MOST_LINES)
    (tmp_path / ".gitignore").write_text("build/\n")
    if with_git:
        try:
            subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
        except OSError:
            pytest.skip("there is no git")
    expected = [f"long{s} has {MOST_LINES + 1} lines, at most {MOST_LINES}" for s in SUFFIXES]
    assert sorted(long_files(tmp_path)) == sorted(expected)
