"""The C++ and CUDA sources: what knows Python, and that nothing prints."""

import re

from cases import case
from source_rules import ROOT, knows_python, native_files


def test_only_the_folder_python_knows_python():
    assert len(native_files(ROOT)) > 5
    assert knows_python(ROOT) == []
    assert any((ROOT / "runtime/csrc/python").glob("*"))


INCLUDES = ["#include <pybind11/numpy.h>", '# include "pybind11/stl.h"', "#include <Python.h>"]


def test_the_rule_sees_headers_of_python(tmp_path):
    for number, line in enumerate(INCLUDES):
        with case(line):
            root = tmp_path / str(number)
            for folder in ("cpu", "python"):
                (root / "runtime/csrc" / folder).mkdir(parents=True)
                (root / "runtime/csrc" / folder / "a.cpp").write_text(
                    f"#include <vector>\n{line}\n"
                )
            (root / "runtime/csrc/network.h").write_text("// pybind11 is not used here\n")
            assert knows_python(root) == ["runtime/csrc/cpu/a.cpp"]


def test_native_code_does_not_print():
    """Below the bindings there are no streams and no printf."""
    pattern = re.compile(r"\b(std::c(out|err|log)|f?printf|puts|perror)\b|#\s*include\s*<iostream>")
    for path in native_files(ROOT):
        assert not pattern.search(path.read_text(encoding="utf-8")), path
