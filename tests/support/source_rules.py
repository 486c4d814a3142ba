"""The rules that the project's sources keep, as functions of the folder that holds them.

Every function returns what breaks its rule, as text that names file and line. The tests in
tests/rules ask them of the project, and of small made-up trees that break each rule on purpose.
"""

import ast
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("sdk", "export", "runtime", "benchmarks")
NATIVE = ("_core", "_cuda")  # modules of the package runtime that are compiled

# Layers of the package runtime: a module imports modules of its own layer and of those before.
LAYERS = ("base", "device", "pictures", "core", "engines", "prior", "bundle", "tools")
BASE = ("errors", "checks", "files", "flavours", "opencv", "tensors", "urls")

MOST_LINES = 600
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".sh")

# Where an objective may be compared with a name: where the answers to questions about it stand.
OBJECTIVE_MODULES = ("runtime/core/parameters.py",)
OBJECTIVES = ("residual", "dynaguide", "dynaseg")

KNOWS_PYTHON = re.compile(r"#\s*include\s*[<\"](pybind11|Python\.h|numpy)")
NAMED_TUPLE = ("_asdict", "_replace", "_fields", "_make")
# Documented, or the only name there is: of os, of torch.cuda and of torch.
NOT_PRIVATE = (*NAMED_TUPLE, "_exit", "_sleep", "_foreach_mul_")


# Files


def python_files(root, *folders):
    """Python files of ``folders``, in order."""
    return [p for folder in folders for p in sorted((root / folder).rglob("*.py"))]


def relative(path, root=ROOT):
    return path.relative_to(root).as_posix()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def project_files(root):
    """Files that Git knows, new ones included; all files where there is no repository of Git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        found = [root / name for name in done.stdout.split("\0") if name]
        if done.returncode == 0 and found:
            return sorted(p for p in found if p.is_file())
    except OSError:
        pass
    found = []
    for top, folders, files in os.walk(root):
        skipped = ("build", "__pycache__", "node_modules")
        folders[:] = [f for f in folders if not f.startswith((".", "venv")) and f not in skipped]
        found += [Path(top) / name for name in files]
    return sorted(found)


def long_files(root, most=MOST_LINES):
    """Sources of more than ``most`` lines."""
    out = []
    for path in project_files(root):
        if path.suffix in SUFFIXES:
            count = path.read_bytes().count(b"\n")
            if count > most:
                out.append(f"{relative(path, root)} has {count} lines, at most {most}")
    return out


# Imports


class Import(NamedTuple):
    """A module that a statement imports, and the name that it takes from it, if any."""

    module: str
    name: str | None
    line: int
    at_import: bool  # the statement runs when its module is imported


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree, *, for_type_checkers=False):
    """Every import, those inside functions included; those for type checkers only when asked."""
    found, todo = [], [(tree, True)]
    while todo:
        node, at_import = todo.pop()
        if isinstance(node, ast.Import):
            found += [Import(alias.name, None, node.lineno, at_import) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            found += [Import(node.module, a.name, node.lineno, at_import) for a in node.names]
        if is_type_checking(node):
            todo += [(child, at_import) for child in node.orelse]
            todo += [(child, False) for child in node.body if for_type_checkers]
            continue
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        todo += [(child, at_import and not function) for child in ast.iter_child_nodes(node)]
    return sorted(found, key=lambda i: (i.line, i.module, i.name or ""))


def module_of(path, root):
    """The name that a file is imported by; modules of tests/support have no package."""
    parts = path.relative_to(root).with_suffix("").parts
    if parts[:2] == ("tests", "support"):
        parts = parts[2:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_files(root, *folders):
    """Module name -> file."""
    return {module_of(p, root): p for p in python_files(root, *folders)}


def imported_modules(path, files):
    """{module among ``files`` that a file imports: line of the import}.

    That importing a module runs the ``__init__`` of its package is not counted.
    """
    edges = {}
    for found in imports(parse(path)):
        inner = f"{found.module}.{found.name}"
        target = inner if inner in files else found.module
        if target in files and files[target] != path and found.name not in NATIVE:
            edges.setdefault(target, found.line)
    return edges


def module_graph(root, *folders):
    """Module name -> {imported module of the same folders: line of the import}."""
    files = module_files(root, *folders)
    return {module: imported_modules(path, files) for module, path in files.items()}


def import_circles(graph):
    """One circle for each group of modules that import each other, as a list of their names."""
    circles, left = [], set(graph)
    while left:
        start = min(left)
        path = shortest_circle(graph, start)
        if path is None:
            left.discard(start)
            continue
        circles.append(path)
        left -= {m for m in left if reaches(graph, start, m) and reaches(graph, m, start)}
    return circles


def shortest_circle(graph, start):
    """The shortest way from ``start`` back to it, or None."""
    ways, seen = [[start]], set()
    while ways:
        way = ways.pop(0)
        for target in sorted(graph.get(way[-1], ())):
            if target == start:
                return [*way, start]
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return None


def reaches(graph, start, end):
    """Whether imports lead from ``start`` to ``end``."""
    todo, seen = [start], set()
    while todo:
        for target in graph.get(todo.pop(), ()):
            if target == end:
                return True
            if target not in seen:
                seen.add(target)
                todo.append(target)
    return False


def layer_of(module):
    """The number of the layer of a module of runtime; None for ``runtime`` and ``__main__``.

    A module that is in no layer has a number of its own, -1.
    """
    parts = module.split(".")
    if parts in (["runtime"], ["runtime", "__main__"]):
        return None
    if parts[1] in BASE and len(parts) == 2:
        return 0
    return LAYERS.index(parts[1]) if parts[1] in LAYERS[1:] else -1


def wrong_order(root):
    """Imports inside runtime that go from a layer to a later one, or to ``runtime`` itself."""
    out = []
    files = module_files(root, "runtime")
    for module, path in files.items():
        own = layer_of(module)
        if own is None:
            continue
        if own < 0:
            out.append(f"{relative(path, root)} belongs to no layer: {', '.join(LAYERS)}")
            continue
        for target, line in imported_modules(path, files).items():
            place = f"{relative(path, root)}:{line}"
            other = layer_of(target)
            if other is None:
                out.append(f"{place} imports {target}, which is above all layers")
            elif other > own:
                out.append(f"{place}: {LAYERS[own]} imports {target} of {LAYERS[other]}")
    return out


# Private names


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in NOT_PRIVATE


def names_of_classes(tree):
    """What the classes of a file define: methods, class attributes, and attributes of self."""
    names = set()
    for cls in ast.walk(tree):
        if not isinstance(cls, ast.ClassDef):
            continue
        for node in cls.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names.add(node.name)
            names |= {
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name)
                and isinstance(n.ctx, ast.Store)
                and not isinstance(node, ast.FunctionDef)
            }
        names |= {
            n.attr
            for n in ast.walk(cls)
            if isinstance(n, ast.Attribute)
            and isinstance(n.ctx, ast.Store)
            and ast.unparse(n.value) == "self"
        }
    return names


def is_native(name):
    """Whether a name with its package is that of a compiled module."""
    return name in [f"runtime.{module}" for module in NATIVE]


def private_names(tree, *, in_strings=False):
    """(line, name) of every private name of another module or object that a file uses.

    Names that a class of the same file has are the file's own, whatever the object is called.
    ``in_strings``: names that setattr and the like get as text count, too.
    """
    own = names_of_classes(tree)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                of_runtime = isinstance(node, ast.ImportFrom) and node.module == "runtime"
                name = f"runtime.{alias.name}" if of_runtime else alias.name
                if not is_native(name):
                    found |= {(node.lineno, part) for part in name.split(".") if is_private(part)}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not of_itself and node.attr not in own and not is_native(ast.unparse(node)):
                found.add((node.lineno, node.attr))
        elif in_strings and isinstance(node, ast.Call):
            if re.fullmatch(r"(.*\.)?(set|get|del|has)attr", ast.unparse(node.func)):
                for argument in node.args[:2]:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        last = argument.value.rpartition(".")[2]
                        if is_private(last) and not is_native(argument.value):
                            found.add((node.lineno, last))
    return sorted(found)


def private_uses(root, *folders):
    """Uses of private names of others in the Python files of ``folders``."""
    return [
        f"{relative(path, root)}:{line}: {name}"
        for path in python_files(root, *folders)
        for line, name in private_names(parse(path))
    ]


def private_names_of_tests(root):
    """File -> private names of others that it uses, for the files of tests."""
    table = {}
    for path in python_files(root, "tests"):
        names = {name for _, name in private_names(parse(path), in_strings=True)}
        if names:
            table[relative(path, root)] = names
    return table


# Objectives


def is_objective(node):
    """Whether an expression is called objective: a name, an attribute, an entry."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value == "objective"
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)
    return name == "objective"


def texts(node):
    """The string literals of an expression that is one, or a tuple, list or set of some."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return [t for element in node.elts for t in texts(element)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def objective_comparisons(root, *folders):
    """Comparisons of an objective with a literal, outside of OBJECTIVE_MODULES."""
    out = []
    for path in python_files(root, *folders):
        if relative(path, root) in OBJECTIVE_MODULES:
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                literals = [t for side in sides for t in texts(side)]
                names = any(is_objective(side) for side in sides)
                if literals and (names or any(t in OBJECTIVES for t in literals)):
                    out.append(f"{relative(path, root)}:{node.lineno}: {ast.unparse(node)}")
            elif isinstance(node, ast.Match) and is_objective(node.subject):
                out.append(f"{relative(path, root)}:{node.lineno}: match on an objective")
    return out


# Native code


def native_files(root):
    return [p for p in sorted((root / "runtime/csrc").rglob("*")) if p.is_file()]


def knows_python(root):
    """Native files that include Python's or pybind11's headers outside of csrc/python."""
    place = "runtime/csrc/python/"
    return [
        relative(path, root)
        for path in native_files(root)
        if KNOWS_PYTHON.search(path.read_text(encoding="utf-8"))
        and not relative(path, root).startswith(place)
    ]
