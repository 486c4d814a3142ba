"""Build runtime._core, the C++ core, and runtime._cuda if setup_cuda.py chooses to build it. All
other settings of the package are in pyproject.toml.

SEG_CUDA=0, SEG_CUDA=1 and SEG_CUDA_ARCHS=87 decide about runtime._cuda: see setup_cuda.py.
SEG_BUILD_JOBS is the number of files that are compiled at the same time.

SEG_SANITIZE=address,undefined builds with those sanitizers, and without runtime._cuda; SEG_WERROR=1
makes warnings errors (both for tests).
"""

import hashlib
import os
import re
import shlex
import shutil
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CompileError, ExecError

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pip's build does not search here
from setup_cuda import (  # noqa: F401 (tests use setup.py's names)
    COMPILER,
    WITHOUT,
    Choice,
    architectures,
    ask,
    choose,
    cuda_version,
    dotted,
    find_nvcc,
)

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


def python_files(*names: str) -> list[str]:
    """The paths of files in runtime/csrc/python; only files of that folder include pybind11."""
    return [f"runtime/csrc/python/{name}.cpp" for name in names]


headers = sorted(glob("runtime/csrc/**/*.h", recursive=True) + glob("runtime/csrc/cuda/*.cuh"))
core = Pybind11Extension(
    "runtime._core",
    [*python_files("core", "kernels"), *sorted(glob("runtime/csrc/cpu/*.cpp"))],
    depends=headers,
    extra_compile_args=flags,
    extra_link_args=links,
)


# CUDA


def code_flags(chosen: list[int]) -> list[str]:
    """nvcc's flags for the sorted architectures ``chosen``: machine code for each, and PTX of the
    newest, which drivers compile for newer GPUs."""
    code = {n: f"sm_{n}" for n in chosen}
    code[chosen[-1]] = f"[sm_{chosen[-1]},compute_{chosen[-1]}]"
    return [f"-gencode=arch=compute_{n},code={code[n]}" for n in chosen]


def capabilities(chosen: list[int]) -> str:
    """The words that runtime._cuda.architectures() returns as a list: "8.7 9.0 9.0+ptx"."""
    names = [dotted(n) for n in chosen]
    return " ".join([*names, f"{names[-1]}+ptx"])


def folders(plan: str, name: str) -> list[str]:
    """The folders that nvcc searches for headers or libraries.

    Parameters
    ----------
    plan : the output of ``nvcc --dryrun``.
    name : "INCLUDES" or "LIBRARIES".
    """
    line = re.search(rf"^#\$ {name}=(.*)$", plan, re.MULTILINE)
    return [word[2:] for word in shlex.split(line[1] if line else "") if word[:2] in ("-I", "-L")]


class Build(build_ext):
    """Compiles .cu files with nvcc. The objects of unchanged files are copied from build/nvcc."""

    nvcc: tuple[str, ...] = ()  # the command without files
    nvcc_version = ""  # the output of nvcc --version

    def build_extensions(self) -> None:
        compile_cpp = self.compiler._compile

        def compile_one(target: str, source: str, *rest: object) -> None:
            if source.endswith(".cu"):
                self.compile_cuda(target, source)
            else:
                compile_cpp(target, source, *rest)

        self.compiler.src_extensions = [*self.compiler.src_extensions, ".cu"]
        self.compiler._compile = compile_one
        super().build_extensions()

    def compile_cuda(self, target: str, source: str) -> None:
        """Compile a .cu file, or copy the object of an earlier build. pip builds all files each
        time. So objects are stored under a hash of the source, the headers, and nvcc's command,
        version and environment variables.

        Raises
        ------
        CompileError : nvcc does not compile the file.
        """
        settings = sorted(pair for pair in os.environ.items() if pair[0].startswith("NVCC_"))
        made_of = hashlib.sha256(repr((self.nvcc, self.nvcc_version, settings)).encode())
        for path in (source, *headers):
            made_of.update(Path(path).read_bytes())
        kept = Path("build/nvcc", f"{Path(source).stem}-{made_of.hexdigest()[:32]}.o")
        if not kept.exists():
            try:
                self.spawn([*self.nvcc, "-c", source, "-o", target])
            except ExecError as error:
                raise CompileError(
                    f"nvcc cannot compile {source}, see above\n  fix: {WITHOUT}; {COMPILER}"
                ) from error
            kept.parent.mkdir(parents=True, exist_ok=True)
            half = kept.with_suffix(f".{os.getpid()}")
            shutil.copyfile(target, half)
            half.replace(kept)
        shutil.copyfile(kept, target)


def cuda(choice: Choice) -> Pybind11Extension:
    """The extension runtime._cuda, and the settings of Build for its files. The module contains the
    CUDA runtime, so that it can be imported without a driver."""
    assert choice.nvcc is not None
    chosen = list(choice.architectures)
    werror = ("--Werror", "all-warnings") if os.environ.get("SEG_WERROR") else ()
    Build.nvcc_version = choice.nvcc_version
    Build.nvcc = (
        *(choice.nvcc, "-O3", "-std=c++17", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"),
        *(*code_flags(chosen), *werror),
    )
    sources = sorted(glob("runtime/csrc/cuda/*.cu"))
    plan = ask(choice.nvcc, "--dryrun", "-c", sources[0])
    return Pybind11Extension(
        "runtime._cuda",
        [*sources, *python_files("cuda", "cuda_refiner", "arrays")],
        depends=headers,
        define_macros=[("SEG_CUDA_ARCHITECTURES", f'"{capabilities(chosen)}"')],
        include_dirs=folders(plan, "INCLUDES"),
        library_dirs=folders(plan, "LIBRARIES"),
        libraries=["cudart_static", "dl", "rt"],
        extra_compile_args=flags,
        extra_link_args=links,
    )


def extensions() -> list[Pybind11Extension]:
    """The extensions to compile. pip runs this file several times. Only commands that build choose
    about CUDA, print the choice, and delete the files that the choice removes."""
    if {"egg_info", "dist_info", "sdist"} & {*sys.argv[1:]}:
        return [core]
    choice = choose()
    print(f"CUDA core: {choice.line}", file=sys.stderr)
    for path in choice.removed:
        path.unlink()
    return [core, cuda(choice)] if choice.architectures else [core]


if __name__ == "__main__":
    ParallelCompile("SEG_BUILD_JOBS", default=os.cpu_count() or 1).install()
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": Build},
        include_package_data=False,
        packages=find_packages(include=["sdk*", "export*", "runtime*", "benchmarks*"]),
        package_data={"runtime": ["_core.pyi", "_cuda.pyi", "py.typed"], "sdk": ["py.typed"]},
    )
