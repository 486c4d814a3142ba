"""OpenCV crashes on names that are not UTF-8: it sees names in a few places only."""

import ast

from source_rules import PACKAGES, ROOT, parse, python_files, relative

# Functions of OpenCV that take the name of a file or window, and the files that may call them.
DOORS = {
    "VideoCapture": {"sdk/source.py"},
    "VideoWriter": {"sdk/video_writer.py"},
    "imshow": {"sdk/video_writer.py"},
    "getWindowProperty": {"sdk/video_writer.py"},
}
NEVER = (
    "FileStorage", "destroyWindow", "haveImageReader", "haveImageWriter", "imcount", "imread",
    "imreadanimation", "imreadmulti", "imwrite", "imwriteanimation", "imwritemulti", "namedWindow",
    "resizeWindow", "setWindowTitle",
)  # fmt: skip


def calls(tree, functions):
    """The names of ``functions`` that a module uses as cv2.NAME, or imports from cv2."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "cv2" and node.attr in functions:
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module == "cv2":
            yield from (alias.name for alias in node.names if alias.name in functions)


def test_opencv_sees_names_only_where_they_are_made_utf8():
    wrong, seen = [], set()
    for path in python_files(ROOT, *PACKAGES):
        for name in calls(parse(path), {*DOORS, *NEVER}):
            seen.add(name)
            if relative(path) not in DOORS.get(name, ()):
                wrong.append(f"{relative(path)} calls cv2.{name}")
    assert wrong == [] and seen == set(DOORS)


def test_the_rule_sees_both_ways_to_call():
    source = "import cv2\nfrom cv2 import imwrite\nvideo = cv2.VideoCapture(name)\ncv2.blur(a)"
    assert sorted(calls(ast.parse(source), {*DOORS, *NEVER})) == ["VideoCapture", "imwrite"]
