"""Who imports whom: the sources are parsed."""

import ast
import sys

from cases import case
from source_rules import (
    PACKAGES,
    ROOT,
    import_circles,
    imports,
    module_graph,
    parse,
    python_files,
    relative,
    wrong_order,
)

ALLOWED = {  # of our own packages, besides itself
    "runtime": set(),
    "sdk": {"runtime"},
    "export": {"runtime"},
    "benchmarks": {"sdk", "export", "runtime"},
    "tests": set(PACKAGES),
}
BY_NAME = {"runtime/__init__.py": "import_module", "runtime/tools/probe.py": "metadata"}


def loaded_packages(tree, *, at_import):
    """All top-level names imported, those for type checkers included; ``at_import``: only by
    statements that importing runs."""
    found = imports(tree, for_type_checkers=True)
    return {i.module.split(".")[0] for i in found if i.at_import or not at_import}


def outside(names):
    return names - set(sys.stdlib_module_names) - set(PACKAGES) - {"__future__"}


# The tests of the tests: a parser that finds nothing would let everything pass.


def test_the_parser_finds_imports_where_they_are():
    tree = ast.parse(
        "import a.b, c\nfrom d.e import f\nif x:\n    import g\nclass H:\n    import i\n"
        "def j():\n    import k\n    def l():\n        from m import n\n"
        "try:\n    import o\nexcept ImportError:\n    pass\n"
        "if TYPE_CHECKING:\n    import p\n"
    )
    assert loaded_packages(tree, at_import=True) == {"a", "c", "d", "g", "i", "o"}
    assert loaded_packages(tree, at_import=False) == {"a", "c", "d", "g", "i", "k", "m", "o", "p"}
    assert outside({"os", "sdk", "json", "torch"}) == {"torch"}


def test_the_sources_are_there():
    found = {relative(p) for p in python_files(ROOT, *PACKAGES)}
    assert {f"{name}/__init__.py" for name in PACKAGES} < found
    assert {"sdk/segmenter.py", "runtime/engines/onnx.py", "runtime/core/refiner.py"} < found


def plant(root, files):
    """Write ``files`` (path -> text) under ``root``."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# Directions


def test_imports_go_one_way():
    for path in python_files(ROOT, *PACKAGES):
        with case(relative(path)):
            package = path.relative_to(ROOT).parts[0]
            ours = loaded_packages(parse(path), at_import=False) & {*PACKAGES, "tests"}
            assert ours - {package} <= ALLOWED[package]


def test_nothing_imports_by_a_computed_name():
    """importlib and __import__ would go around the rules above. The doctor alone reads
    importlib.metadata, the standard library's list of what is installed, and the package runtime
    loads its public functions by name from the modules that its imports for type checkers show."""
    for path in python_files(ROOT, *PACKAGES):
        tree = parse(path)
        if relative(path) in BY_NAME:
            used = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))
                    and "importlib" in ast.unparse(n)]  # fmt: skip
            expected = f"from importlib import {BY_NAME[relative(path)]}"
            assert [ast.unparse(n) for n in used] == [expected]
        else:
            assert "importlib" not in loaded_packages(tree, at_import=False), path
        for node in ast.walk(tree):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            assert called not in ("__import__", "exec", "eval"), path


def test_importing_loads_only_numpy_opencv_and_the_core():
    for path in python_files(ROOT, "sdk", "runtime"):
        with case(relative(path)):
            allowed = {"numpy"} | ({"tqdm"} if path.name in ("__main__.py", "cli.py") else set())
            allowed |= {"cv2"} if relative(path) == "runtime/opencv.py" else set()
            assert outside(loaded_packages(parse(path), at_import=True)) <= allowed


def test_one_module_imports_opencv():
    """It makes one clear error of an OpenCV that is missing or broken."""
    found = [
        relative(path)
        for path in python_files(ROOT, *PACKAGES)
        if "cv2" in loaded_packages(parse(path), at_import=False)
    ]
    assert found == ["runtime/opencv.py"]


def test_the_runtime_never_needs_the_training_packages():
    for path in python_files(ROOT, "sdk", "runtime"):
        with case(relative(path)):
            allowed = {"numpy", "cv2", "onnxruntime", "skimage", "safetensors"}
            allowed |= {"tensorrt", "tensorrt_rtx", "pycuda"}
            allowed |= {"tqdm"} if path.name in ("__main__.py", "cli.py") else set()
            assert outside(loaded_packages(parse(path), at_import=False)) <= allowed


def test_sdk_does_not_import_its_own_command_line():
    for path in python_files(ROOT, "sdk"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "sdk.__main__", path


def test_test_files_do_not_import_each_other():
    """What they share stands in tests/support."""
    for path in python_files(ROOT, "tests"):
        with case(relative(path)):
            for found in imports(parse(path)):
                first = found.module.split(".")[0]
                assert first not in ("conftest", "tests") and not first.startswith("test_"), found


# Layers of runtime


def test_imports_in_runtime_go_from_later_layers_to_earlier_ones():
    assert wrong_order(ROOT) == []


RIGHT = {
    "runtime/__init__.py": "from runtime.tools import doctor\n",
    "runtime/__main__.py": "from runtime.tools import doctor\n",
    "runtime/errors.py": "",
    "runtime/files.py": "from runtime.errors import SdkError\n",
    "runtime/device/choose.py": "from runtime import _core, errors\n",
    "runtime/core/refiner.py": "from runtime.device.choose import isa\n",
    "runtime/engines/onnx.py": "import runtime.core.refiner\n",
    "runtime/prior/network.py": "from runtime.engines import onnx\n",
    "runtime/bundle/open.py": "from runtime.prior.network import NetworkPrior\n",
    "runtime/tools/doctor.py": "from runtime.bundle import open\n",
}


def test_layers_in_their_order_are_right(tmp_path):
    plant(tmp_path, RIGHT)
    assert wrong_order(tmp_path) == []


AGAINST = [
    ("errors.py", "from runtime.device import choose", "base imports runtime.device.choose"),
    ("device/choose.py", "import runtime.core.refiner", "device imports runtime.core.refiner"),
    ("core/refiner.py", "def f():\n    from runtime.engines.onnx import x", "core imports"),
    ("engines/onnx.py", "from runtime.prior.network import x", "engines imports"),
    ("prior/network.py", "from runtime.bundle import open", "prior imports"),
    ("bundle/open.py", "from runtime.tools.doctor import x", "bundle imports"),
    ("core/refiner.py", "import runtime", "imports runtime, which is above all layers"),
    ("bundle/open.py", "from runtime import refine", "imports runtime, which is above"),
    ("other/new.py", "", "runtime/other/new.py belongs to no layer"),
    ("new.py", "", "runtime/new.py belongs to no layer"),
]


def test_the_rule_sees_imports_against_the_order(tmp_path):
    for number, (file, text, what) in enumerate(AGAINST):
        with case(file, what):
            root = tmp_path / str(number)
            plant(root, RIGHT | {f"runtime/{file}": text})
            found = wrong_order(root)
            assert len(found) == 1 and what in found[0], found


def test_imports_for_type_checkers_do_not_count(tmp_path):
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import runtime.tools.doctor\n"
    plant(tmp_path, RIGHT | {"runtime/errors.py": text})
    assert wrong_order(tmp_path) == []
    assert import_circles(module_graph(tmp_path, "runtime")) == []


# Circles


def test_no_modules_import_each_other():
    assert import_circles(module_graph(ROOT, *PACKAGES, "tests/support")) == []


def test_the_rule_sees_circles(tmp_path):
    files = {
        "sdk/__init__.py": "from sdk.a import x\n",
        "sdk/a.py": "import sdk.b\n",
        "sdk/b.py": "def f():\n    from sdk import c\n",
        "sdk/c.py": "try:\n    from sdk.a import x\nexcept ImportError:\n    pass\n",
        "sdk/d.py": "from sdk.a import x\n",
        "tests/support/one.py": "import two\n",
        "tests/support/two.py": "from one import x\n",
    }
    plant(tmp_path, files)
    graph = module_graph(tmp_path, "sdk", "tests/support")
    assert graph["sdk.d"] == {"sdk.a": 1} and graph["sdk"] == {"sdk.a": 1}
    assert import_circles(graph) == [["one", "two", "one"], ["sdk.a", "sdk.b", "sdk.c", "sdk.a"]]
