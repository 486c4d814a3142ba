"""Which code may catch every error, and which may print."""

import ast
import re

from cases import case
from source_rules import PACKAGES, ROOT, parse, python_files, relative

COMMANDS = ("runtime/tools/build.py", "runtime/tools/output.py")  # of python -m runtime


def test_errors_are_caught_by_name():
    """One place may catch all: what ends a capture's thread is raised where its frames are read."""
    for path in python_files(ROOT, *PACKAGES):
        with case(relative(path)):
            broad = []
            for node in ast.walk(parse(path)):
                if isinstance(node, ast.ExceptHandler):
                    caught = "" if node.type is None else ast.unparse(node.type)
                    if not caught or re.search(r"\b(Base)?Exception\b", caught):
                        broad.append(node)
            if relative(path) == "sdk/capture.py":
                assert len(broad) == 1 and "last = error" in ast.unparse(broad[0])
            else:
                assert broad == []


def test_nothing_prints_but_the_command_lines():
    for path in python_files(ROOT, "sdk", "runtime", "export"):
        if path.name in ("__main__.py", "cli.py") or relative(path) in COMMANDS:
            continue
        for node in ast.walk(parse(path)):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            assert called not in ("print", "sys.stdout.write", "sys.stderr.write"), path
