"""Builds runtime._core, the C++ core. Everything else is in pyproject.toml.

SEG_SANITIZE=address,undefined builds with those sanitizers, SEG_WERROR=1 makes warnings errors
(both for tests).
"""

import os
import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

flags = [
    "-O3",
    "-std=c++17",
    "-pthread",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
links = ["-pthread"]
if sanitize := os.environ.get("SEG_SANITIZE"):
    flags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    links += [f"-fsanitize={sanitize}"]
if os.environ.get("SEG_WERROR"):
    flags += ["-Werror"]
if sys.platform == "win32":
    raise SystemExit("dynaguide-edge: the core needs GCC or Clang; on Windows build it inside WSL")

core = Pybind11Extension(
    "runtime._core",
    ["runtime/csrc/bindings.cpp", *sorted(glob("runtime/csrc/cpu/*.cpp"))],
    depends=glob("runtime/csrc/**/*.h", recursive=True),
    extra_compile_args=flags,
    extra_link_args=links,
)

ParallelCompile("SEG_BUILD_JOBS", default=os.cpu_count() or 1).install()
setup(
    ext_modules=[core],
    cmdclass={"build_ext": build_ext},
    include_package_data=False,
    packages=find_packages(include=["sdk*", "export*", "runtime*", "benchmarks*"]),
    package_data={"runtime": ["_core.pyi", "py.typed"], "sdk": ["py.typed"]},
)
