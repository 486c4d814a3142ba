"""Public functions say what they do, and which errors they raise."""

import ast
import inspect
from pathlib import Path

import runtime
import sdk

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("runtime", "sdk", "export", "benchmarks")
OWN = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def raises_itself(node):
    """Whether the body has a ``raise`` of a new error that it does not handle itself. Functions
    inside the body are left out."""
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.Try) and node.handlers:
        children = [*node.handlers, *node.orelse, *node.finalbody]
    for child in children:
        if isinstance(child, OWN):
            continue
        if isinstance(child, ast.Raise) and child.exc is not None:
            return True
        if raises_itself(child):
            return True
    return False


def faults(source, name):
    """The public functions, methods and classes of a module that lack a docstring, or a section
    "Raises" although they raise."""
    found = []

    def visit(node, path):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, OWN[:3]) or child.name.startswith("_"):
                continue
            words = ast.get_docstring(child) or ""
            where = f"{name}:{child.lineno} {'.'.join([*path, child.name])}"
            if not words:
                found.append(f"{where} has no docstring")
            elif not isinstance(child, ast.ClassDef) and raises_itself(child):
                if "Raises\n" not in words:
                    found.append(f"{where} raises, but has no section 'Raises'")
            if isinstance(child, ast.ClassDef):
                visit(child, [*path, child.name])

    visit(ast.parse(source), [])
    return found


def test_public_functions_have_docstrings_that_name_their_errors():
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found += faults(path.read_text(), str(path.relative_to(ROOT)))
    assert not found, "\n".join(["", *found])


def test_the_rule_sees_what_it_forbids():
    bad = "def f():\n    '''Words.'''\n    if 1:\n        raise ValueError('no')\n"
    assert faults(bad, "m.py") == ["m.py:1 f raises, but has no section 'Raises'"]
    assert faults("class A:\n    '''Words.'''\n    def f(self): ...\n", "m.py") == [
        "m.py:3 A.f has no docstring"
    ]
    good = "def f():\n    '''Words.\n\n    Raises\n    ------\n    E : x.\n    '''\n    raise E\n"
    assert not faults(good, "m.py") and not faults("def _f():\n    raise E()\n", "m.py")
    inner = "def f():\n    '''Words.'''\n    def g():\n        raise E()\n    return g\n"
    assert not faults(inner, "m.py")


def test_the_names_that_the_packages_export_have_an_example():
    found = [
        f"{module.__name__}.{name}"
        for module in (sdk, runtime)
        for name in module.__all__
        if not issubclass(type(getattr(module, name)), type)
        or not issubclass(getattr(module, name), BaseException)
        if "Example" not in (inspect.getdoc(getattr(module, name)) or "")
    ]
    assert not found, f"no example in the docstring of {', '.join(found)}"
