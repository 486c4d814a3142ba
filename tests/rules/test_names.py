"""Names: of packages and files, of what they export, and what says what each is."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys

from cases import case
from source_rules import PACKAGES, ROOT, parse, python_files, relative

VAGUE = ("utils", "util", "helpers", "helper", "common", "misc", "manager")


def run(program, **options):
    """The last line that ``program`` prints, as JSON, in a fresh interpreter outside the tree."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_each_package_says_which_distribution_it_belongs_to():
    for name in PACKAGES:
        with case(name):
            assert importlib.import_module(name).__dist__ == "dynaguide-edge"


IMPORT_SDK = """
import json
try:
    import sdk
except ImportError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
FOREIGN = ["", "__dist__ = 'somebody-else'", "raise_on_use = None\n__dist__ = None"]


def test_a_foreign_runtime_is_named(tmp_path):
    for number, content in enumerate(FOREIGN):
        with case(content):
            folder = tmp_path / str(number)
            (folder / "runtime").mkdir(parents=True)
            (folder / "runtime/__init__.py").write_text(content)
            # our own sdk, but the foreign runtime first on the path
            places = [str(folder), str(ROOT)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
            kind, message = run(IMPORT_SDK, cwd=folder, env=environment)
            assert kind == "ImportError" and str(folder / "runtime") in message
            assert re.search(
                r"the package 'runtime' in .* belongs to another project; uninstall it, or install",
                message,
            )


def test_all_names_exist_and_are_sorted_and_complete():
    for name in ("sdk", "runtime"):
        with case(name):
            module = importlib.import_module(name)
            assert module.__all__ == sorted(set(module.__all__))
            for exported in module.__all__:
                assert getattr(module, exported).__module__.split(".")[0] in ("sdk", "runtime")
            tree = parse(ROOT / name / "__init__.py")
            brought = {
                alias.asname or alias.name
                for node in ast.walk(tree)  # the imports of runtime are for type checkers
                if isinstance(node, ast.ImportFrom)
                and node.module.split(".")[0] in ("sdk", "runtime")
                for alias in node.names
            }
            assert brought == set(module.__all__)


def test_every_module_and_public_function_says_what_it_is():
    for path in python_files(ROOT, "sdk", "runtime"):
        with case(relative(path)):
            tree = parse(path)
            assert ast.get_docstring(tree)
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(
                    "_"
                ):
                    assert ast.get_docstring(node), node.name


def test_names_of_files_say_what_is_in_them():
    for path in [*python_files(ROOT, *PACKAGES, "tests"), ROOT / "setup.py"]:
        with case(relative(path)):
            assert path.stem not in VAGUE
