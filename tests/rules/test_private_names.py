"""Names with an underscore are used by their own module alone."""

import ast

from cases import case
from source_rules import PACKAGES, ROOT, private_names, private_names_of_tests, private_uses

# What the tests still use. The list is exact: an entry that is no longer needed fails.
USED_BY_TESTS = {
    "tests/benchmarks/test_training.py": {"_lloyd"},
    "tests/bundle/test_read.py": {"_canonical"},
    "tests/bundle/test_write.py": {"_fill", "_remove_abandoned"},
    "tests/cuda/test_segmenter.py": {"_cuda"},
    "tests/device/test_cuda_devices.py": {"_cuda"},
    "tests/device/test_driver.py": {
        "_DRIVER",
        "_MEMINFO",
        "_TEGRA_RELEASE",
        "_TREE_MODEL",
        "_memory_available",
    },
    "tests/device/test_failing_driver.py": {"_obj", "_targets"},
    "tests/engines/test_graph_refiner.py": {"_session"},
    "tests/engines/test_onnx.py": {"_session"},
    "tests/engines/test_onnx_errors.py": {"_session"},
    "tests/engines/test_onnx_int8.py": {"_session"},
    "tests/engines/test_tensorrt_build.py": {"_failure"},
    "tests/engines/test_tensorrt_engine.py": {"_HUNG", "_sessions"},
    "tests/export/train/test_features.py": {"_maker"},
    "tests/sdk/test_capture.py": {"_ends", "_thread"},
    "tests/sdk/test_cli.py": {"_segment"},
    "tests/sdk/test_cli_stream.py": {"_writer"},
    "tests/sdk/test_stream.py": {"_keep_and_decay"},
    "tests/support/cuda_module.py": {"_cuda"},
    "tests/support/fake_tensorrt.py": {"_obj"},
    "tests/tools/conftest.py": {"_DRIVER", "_TEGRA_RELEASE", "_TREE_MODEL"},
    "tests/tools/test_cli.py": {"_core"},
    "tests/tools/test_doctor.py": {"_CPUFREQ", "_TEGRA_RELEASE", "_TREE_MODEL"},
    "tests/tools/test_doctor_libraries.py": {"_SECONDS", "_library_version"},
}


def test_the_packages_use_no_private_names_of_others():
    assert private_uses(ROOT, *PACKAGES) == []


def table(names):
    """The rows of the table above, to be copied there from the message of a failed test."""
    rows = []
    for file in sorted(names):
        quoted = ", ".join(f'"{name}"' for name in sorted(names[file]))
        rows.append(f'    "{file}": {{{quoted}}},')
    return "\n".join(rows)


def test_the_tests_use_no_other_private_names_than_listed():
    assert table(private_names_of_tests(ROOT)) == table(USED_BY_TESTS)


SEEN = [
    ("from a.b import _c", "_c"),
    ("import a._b", "_b"),
    ("import a\na._b()", "_b"),
    ("import a\na.b._c = 1", "_c"),
    ("def f(other):\n    return other._size", "_size"),
    ("f().g[0]._h", "_h"),
    ("def f(pipeline):\n    return pipeline._core", "_core"),
    ("from played import _cuda", "_cuda"),
]


def test_the_rule_sees_private_names():
    for line, name in SEEN:
        with case(line):
            assert [found for _, found in private_names(ast.parse(line))] == [name]


FREE = [
    "from runtime import _core, _cuda",
    "import runtime._core\nruntime._core.lanes()",
    "from __future__ import annotations",
    "row._replace(a=1)._asdict()",
    "x.__class__.__name__",
    "class A:\n    def f(self, other):\n        self._x = other._x",
    "class A:\n    def _g(self): pass\ndef f(a):\n    return a._g()",
    "def _own(): pass\n_own()",
]


def test_own_and_public_names_are_free():
    for line in FREE:
        with case(line):
            assert private_names(ast.parse(line), in_strings=True) == []


def test_names_in_strings_are_seen_in_tests(tmp_path):
    line = 'monkeypatch.setattr(a, "_b", 1)\nmonkeypatch.setattr("c.d._e", 2)\nhasattr(a, "f")\n'
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text(line)
    assert private_names(ast.parse(line)) == []
    assert private_names_of_tests(tmp_path) == {"tests/test_a.py": {"_b", "_e"}}
