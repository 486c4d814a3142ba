"""Who imports whom, and what importing costs: the sources are parsed, the imports are run."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("sdk", "export", "runtime", "benchmarks")
ALLOWED = {  # of our own packages, besides itself
    "runtime": set(),
    "sdk": {"runtime"},
    "export": {"runtime"},
    "benchmarks": {"sdk", "export", "runtime"},
    "tests": set(PACKAGES),
}
HEAVY = (
    *("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "pycuda", "transformers"),
    *("safetensors", "scipy", "skimage", "tqdm"),
)
THIRD = {"sdk": {"numpy", "cv2"}, "runtime": {"numpy"}}  # at module level
MOST_LINES = 800


def sources(*packages):
    return [p for name in packages for p in sorted((ROOT / name).rglob("*.py"))]


def relative(path):
    return path.relative_to(ROOT).as_posix()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(node):
    """Top-level names that an import statement loads."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return {node.module.split(".")[0]}
    return set()


def imports(tree, *, at_import):
    """All top-level names imported; ``at_import``: only by statements that importing runs."""
    found, todo = set(), [tree]
    while todo:
        node = todo.pop()
        found |= imported(node)
        for child in ast.iter_child_nodes(node):
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if not (at_import and (function or is_type_checking(child))):
                todo.append(child)
    return found


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def outside(names):
    return names - set(sys.stdlib_module_names) - set(PACKAGES) - {"__future__"}


def run(program, **options):
    """The last line that ``program`` prints, as JSON, in a fresh interpreter outside the tree."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# The tests of the tests: a parser that finds nothing would let everything pass.


def test_the_parser_finds_imports_where_they_are():
    tree = ast.parse(
        "import a.b, c\nfrom d.e import f\nif x:\n    import g\nclass H:\n    import i\n"
        "def j():\n    import k\n    def l():\n        from m import n\n"
        "try:\n    import o\nexcept ImportError:\n    pass\n"
        "if TYPE_CHECKING:\n    import p\n"
    )
    assert imports(tree, at_import=True) == {"a", "c", "d", "g", "i", "o"}
    assert imports(tree, at_import=False) == {"a", "c", "d", "g", "i", "k", "m", "o", "p"}
    assert outside({"os", "sdk", "json", "torch"}) == {"torch"}


def test_the_sources_are_there():
    found = {relative(p) for p in sources(*PACKAGES)}
    assert {f"{name}/__init__.py" for name in PACKAGES} < found
    assert {"sdk/segmenter.py", "runtime/engine.py", "runtime/ops.py"} < found


# Directions


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=relative)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    ours = imports(parse(path), at_import=False) & {*PACKAGES, "tests"}
    assert ours - {package} <= ALLOWED[package]


def test_nothing_imports_by_a_computed_name():
    """importlib and __import__ would go around the rules above. The doctor alone reads
    importlib.metadata, the standard library's list of what is installed."""
    for path in sources(*PACKAGES):
        tree = parse(path)
        if relative(path) == "runtime/doctor.py":
            used = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))
                    and "importlib" in ast.unparse(n)]  # fmt: skip
            assert [ast.unparse(n) for n in used] == ["from importlib import metadata"]
        else:
            assert "importlib" not in imports(tree, at_import=False), path
        for node in ast.walk(tree):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            assert called not in ("__import__", "exec", "eval"), path


@pytest.mark.parametrize("path", sources("sdk", "runtime"), ids=relative)
def test_importing_loads_only_numpy_opencv_and_the_core(path):
    package = path.relative_to(ROOT).parts[0]
    allowed = THIRD[package] | ({"tqdm"} if path.name in ("__main__.py", "cli.py") else set())
    assert outside(imports(parse(path), at_import=True)) <= allowed


@pytest.mark.parametrize("path", sources("sdk", "runtime"), ids=relative)
def test_the_runtime_never_needs_the_training_packages(path):
    allowed = {"numpy", "cv2", "onnxruntime", "skimage", "safetensors"}
    allowed |= {"tensorrt", "tensorrt_rtx", "pycuda"}
    allowed |= {"tqdm"} if path.name in ("__main__.py", "cli.py") else set()
    assert outside(imports(parse(path), at_import=False)) <= allowed


def test_sdk_does_not_import_its_own_command_line():
    for path in sources("sdk"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "sdk.__main__", path


# What an import costs

IMPORT = """
import json, sys
import {module}
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
MEASURED = """
import json, resource, sys
import cv2, numpy
before = set(sys.modules)
start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
import sdk
seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - start
loaded = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps([seconds, sorted(loaded)]))
"""


def test_import_sdk_is_light(tmp_path, record_property):
    """What it costs beside NumPy and OpenCV, in this process's own time on a processor: other
    programs do not count. The first process compiles the sources, and is not counted either."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path / "compiled")
    measured = [run(MEASURED, cwd=tmp_path, env=environment) for _ in range(6)][1:]
    for _, loaded in measured:
        assert loaded == ["runtime", "sdk"]
    seconds = sorted(took for took, _ in measured)
    record_property("user_seconds", seconds)
    assert seconds[2] <= 0.10, seconds
    assert not set(run(IMPORT.format(module="sdk"), cwd=tmp_path)) & set(HEAVY)


def test_import_runtime_does_not_even_load_opencv(tmp_path):
    loaded = run(IMPORT.format(module="runtime"), cwd=tmp_path)
    assert not set(loaded) & {*HEAVY, "cv2", "sdk", "export", "benchmarks"}


@pytest.mark.parametrize("module", ["export", "benchmarks", "sdk.__main__", "benchmarks.__main__"])
def test_command_lines_and_tools_import_without_the_extras(tmp_path, module):
    loaded = run(IMPORT.format(module=module), cwd=tmp_path)
    assert not set(loaded) & (set(HEAVY) - {"tqdm"})


def test_segmenting_with_kmeans_loads_no_network_library(tmp_path):
    program = (
        "import json, sys, numpy as np\nfrom sdk import Segmenter\n"
        "Segmenter()(np.zeros((8, 9, 3), np.uint8))\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    assert not set(run(program, cwd=tmp_path)) & set(HEAVY)


# Names


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
    assert re.search(r"the package 'runtime' in .* belongs to another project\n  fix: ", message)


@pytest.mark.parametrize("name", ["sdk", "runtime"])
def test_all_names_exist_and_are_sorted_and_complete(name):
    module = importlib.import_module(name)
    assert module.__all__ == sorted(set(module.__all__))
    for exported in module.__all__:
        assert getattr(module, exported).__module__.split(".")[0] in ("sdk", "runtime")
    tree = parse(ROOT / name / "__init__.py")
    brought = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert brought == set(module.__all__)


# House rules


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=relative)
def test_errors_are_caught_by_name(path):
    """Three places may catch all: ONNX Runtime's errors share no base class of their own, and what
    ends a capture's thread is raised where its frames are read."""
    broad = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            if not caught or re.search(r"\b(Base)?Exception\b", caught):
                broad.append(node)
    if relative(path) == "sdk/capture.py":
        (caught,) = broad
        assert "last = error" in ast.unparse(caught)
        return
    if relative(path) != "runtime/engine.py":
        assert broad == []
        return
    assert len(broad) == 2
    for node in broad:  # and both say it again in our own words
        last = node.body[-1]
        assert isinstance(last, ast.Raise) and last.cause.id == node.name


def test_nothing_prints_but_the_command_lines():
    for path in sources("sdk", "runtime", "export"):
        if path.name in ("__main__.py", "cli.py"):
            continue
        for node in ast.walk(parse(path)):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            assert called not in ("print", "sys.stdout.write", "sys.stderr.write"), path


def test_only_bindings_know_python():
    native = [p for p in (ROOT / "runtime/csrc").rglob("*") if p.is_file()]
    assert len(native) > 5
    include = re.compile(r"#\s*include\s*[<\"](pybind11|Python\.h|numpy)")
    knows = [relative(p) for p in native if include.search(p.read_text(encoding="utf-8"))]
    assert sorted(knows) == [
        "runtime/csrc/bindings.cpp",
        "runtime/csrc/cuda/arrays.h",  # of cuda/bindings.cpp
        "runtime/csrc/cuda/refiner_binding.h",
        "runtime/csrc/python.h",
    ]


def test_native_code_does_not_print():
    """Below the bindings there are no streams and no printf."""
    pattern = re.compile(r"\b(std::c(out|err|log)|f?printf|puts|perror)\b|#\s*include\s*<iostream>")
    for path in (ROOT / "runtime/csrc").rglob("*"):
        if path.is_file():
            assert not pattern.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("path", [*sources(*PACKAGES, "tests"), ROOT / "setup.py"], ids=relative)
def test_files_stay_readable(path):
    with tokenize.open(path) as file:
        assert sum(1 for _ in file) <= MOST_LINES
    assert path.stem not in ("utils", "util", "helpers", "helper", "common", "misc", "manager")


@pytest.mark.parametrize("path", sources("sdk", "runtime"), ids=relative)
def test_every_module_and_public_function_says_what_it_is(path):
    tree = parse(path)
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_opencv_that_cannot_be_loaded_has_a_fix():
    code = "import sys; sys.modules['cv2'] = None; import sdk"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingBackend: OpenCV cannot be loaded" in run.stderr
    assert "fix: apt-get install libgl1" in run.stderr
