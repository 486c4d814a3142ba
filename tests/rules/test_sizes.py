"""No source is longer than a reader can keep in mind."""

import subprocess

from cases import case
from source_rules import MOST_LINES, ROOT, SUFFIXES, long_files, project_files, relative


def test_no_file_is_long():
    found = {relative(p) for p in project_files(ROOT)}
    assert {"setup.py", "runtime/__init__.py", "runtime/csrc/network.h"} <= found
    assert long_files(ROOT) == []


def test_the_rule_sees_long_files(tmp_path):
    """With a repository of Git and without one."""
    for with_git in (False, True):
        with case(with_git):
            root = tmp_path / str(with_git)
            (root / "build").mkdir(parents=True)
            for suffix in SUFFIXES:
                (root / f"long{suffix}").write_text("\n" * (MOST_LINES + 1))
                (root / f"right{suffix}").write_text("\n" * MOST_LINES)
            (root / "long.json").write_text("\n" * 2 * MOST_LINES)
            (root / "build/long.py").write_text("\n" * 2 * MOST_LINES)
            (root / ".gitignore").write_text("build/\n")
            if with_git:
                subprocess.run(["git", "init", "-q"], cwd=root, check=True)
            expected = [
                f"long{s} has {MOST_LINES + 1} lines, at most {MOST_LINES}" for s in SUFFIXES
            ]
            assert sorted(long_files(root)) == sorted(expected)
