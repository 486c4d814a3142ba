"""Names with an underscore are used by their own module alone."""

import ast
import json

import pytest
from source_rules import PACKAGES, ROOT, private_names, private_names_of_tests, private_uses

# What the tests still use. The list is exact: an entry that is no longer needed fails.
USED_BY_TESTS = {}


def test_the_packages_use_no_private_names_of_others():
    assert private_uses(ROOT, *PACKAGES) == []


def table(names):
    """A table as it stands above: what is to be copied there when a use has been taken out."""
    rows = [
        f'    "{file}": {{{", ".join(map(json.dumps, sorted(names[file])))}}},'
        for file in sorted(names)
    ]
    return "\n".join(rows)


def test_the_tests_use_no_other_private_names_than_listed():
    assert table(private_names_of_tests(ROOT)) == table(USED_BY_TESTS)


@pytest.mark.parametrize(
    "line, name",
    [
        ("from a.b import _c", "_c"),
        ("import a._b", "_b"),
        ("import a\na._b()", "_b"),
        ("import a\na.b._c = 1", "_c"),
        ("def f(other):\n    return other._size", "_size"),
        ("f().g[0]._h", "_h"),
    ],
)
def test_the_rule_sees_private_names(line, name):
    assert [found for _, found in private_names(ast.parse(line))] == [name]


@pytest.mark.parametrize(
    "line",
    [
        "from runtime import _core, _cuda",
        "from __future__ import annotations",
        "row._replace(a=1)._asdict()",
        "x.__class__.__name__",
        "class A:\n    def f(self, other):\n        self._x = other._x",
        "class A:\n    def _g(self): pass\ndef f(a):\n    return a._g()",
        "def _own(): pass\n_own()",
    ],
)
def test_own_and_public_names_are_free(line):
    assert private_names(ast.parse(line), in_strings=True) == []


def test_names_in_strings_are_seen_in_tests(tmp_path):
    line = 'monkeypatch.setattr(a, "_b", 1)\nmonkeypatch.setattr("c.d._e", 2)\nhasattr(a, "f")\n'
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text(line)
    assert private_names(ast.parse(line)) == []
    assert private_names_of_tests(tmp_path) == {"tests/test_a.py": {"_b", "_e"}}
