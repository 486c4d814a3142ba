"""Which code may catch every error, and which may print."""

import ast
import re

from cases import case
from source_rules import PACKAGES, ROOT, parse, python_files, relative

COMMANDS = ("runtime/tools/build.py", "runtime/tools/output.py")  # of python -m runtime


def test_errors_are_caught_by_name():
    """Two places may catch all: what ends a thread is raised in the thread of its caller."""
    places = {
        "sdk/capture.py": "last = error",
        "runtime/engines/onnx_runtime.py": "future.set_exception(error)",
    }
    for path in python_files(ROOT, *PACKAGES):
        with case(relative(path)):
            broad = []
            for node in ast.walk(parse(path)):
                if isinstance(node, ast.ExceptHandler):
                    caught = "" if node.type is None else ast.unparse(node.type)
                    if not caught or re.search(r"\b(Base)?Exception\b", caught):
                        broad.append(node)
            if relative(path) in places:
                assert len(broad) == 1 and places[relative(path)] in ast.unparse(broad[0])
            else:
                assert broad == []


def test_nothing_prints_but_the_command_lines():
    for path in python_files(ROOT, "sdk", "runtime", "export"):
        if path.name in ("__main__.py", "cli.py") or relative(path) in COMMANDS:
            continue
        for node in ast.walk(parse(path)):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            assert called not in ("print", "sys.stdout.write", "sys.stderr.write"), path
