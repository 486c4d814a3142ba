"""Names: of packages and files, of what they export, and what says what each is."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from source_rules import PACKAGES, ROOT, parse, python_files, relative

VAGUE = ("utils", "util", "helpers", "helper", "common", "misc", "manager")


def run(program, **options):
    """The last line that ``program`` prints, as JSON, in a fresh interpreter outside the tree."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PACKAGES)
def test_each_package_says_which_distribution_it_belongs_to(name):
    assert importlib.import_module(name).__dist__ == "dynaguide-edge"


@pytest.mark.parametrize(
    "content", ["", "__dist__ = 'somebody-else'", "raise_on_use = None\n__dist__ = None"]
)
def test_a_foreign_runtime_is_named(tmp_path, content):
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime/__init__.py").write_text(content)
    program = (
        "import json\ntry:\n    import sdk\n"
        "except ImportError as error:\n    print(json.dumps([type(error).__name__, str(error)]))\n"
    )
    # our own sdk, but the foreign runtime first on the path
    places = [str(tmp_path), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    kind, message = run(program, cwd=tmp_path, env=environment)
    assert kind == "ImportError" and str(tmp_path / "runtime") in message
    assert re.search(
        r"the package 'runtime' in .* belongs to another project; uninstall it, or install", message
    )


@pytest.mark.parametrize("name", ["sdk", "runtime"])
def test_all_names_exist_and_are_sorted_and_complete(name):
    module = importlib.import_module(name)
    assert module.__all__ == sorted(set(module.__all__))
    for exported in module.__all__:
        assert getattr(module, exported).__module__.split(".")[0] in ("sdk", "runtime")
    tree = parse(ROOT / name / "__init__.py")
    brought = {
        alias.asname or alias.name
        for node in ast.walk(tree)  # the imports of runtime are for type checkers
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("sdk", "runtime")
        for alias in node.names
    }
    assert brought == set(module.__all__)


@pytest.mark.parametrize("path", python_files(ROOT, "sdk", "runtime"), ids=relative)
def test_every_module_and_public_function_says_what_it_is(path):
    tree = parse(path)
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize(
    "path", [*python_files(ROOT, *PACKAGES, "tests"), ROOT / "setup.py"], ids=relative
)
def test_names_of_files_say_what_is_in_them(path):
    assert path.stem not in VAGUE
