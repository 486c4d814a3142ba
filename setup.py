"""Builds runtime._core, the C++ core, and where nvcc is found runtime._cuda. Everything else is in
pyproject.toml. nvcc is looked for in $CUDA_HOME/bin, $CUDA_PATH/bin, PATH and /usr/local/cuda/bin.

SEG_CUDA=0 leaves runtime._cuda out. SEG_CUDA_ARCHS=87, or 80,90, builds it for these compute
capabilities only. SEG_BUILD_JOBS is how many files are compiled at once.

SEG_SANITIZE=address,undefined builds with those sanitizers, and without runtime._cuda; SEG_WERROR=1
makes warnings errors (both for tests).
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CompileError, ExecError

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
    """The files of runtime/csrc/python, which alone include pybind11."""
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

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 110, 120)  # 87 is compute capability 8.7
OLDEST = (11, 4)
WITHOUT = "SEG_CUDA=0 builds without CUDA"
COMPILER = "if nvcc refuses the C++ compiler, name another: NVCC_PREPEND_FLAGS='-ccbin g++-12'"


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", os.defpath)]
    return shutil.which("nvcc", path=os.pathsep.join([*places, "/usr/local/cuda/bin"]))


def refuse(what: str, fix: str) -> SystemExit:
    return SystemExit(f"dynaguide-edge: {what}\n  fix: {fix}")


def ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise refuse(f"{command[0]} cannot be run: {error.strerror}", WITHOUT) from error
    if done.returncode:
        words = (done.stderr + done.stdout).strip()
        raise refuse(f"{' '.join(command)} fails: {words}", f"{WITHOUT}; {COMPILER}")
    return done.stdout + done.stderr


def cuda_version(told: str) -> tuple[int, int]:
    """Of the CUDA toolkit, from what ``nvcc --version`` tells."""
    found = re.search(r"release (\d+)\.(\d+)", told)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < OLDEST:
        raise refuse(
            f"this nvcc is too old, wanted CUDA {OLDEST[0]}.{OLDEST[1]} or newer: {told.strip()}",
            f"CUDA_HOME=/a/newer/toolkit, or {WITHOUT}",
        )
    return version


def architectures(listed: str, wanted: str | None) -> list[int]:
    """What to build for, the newest last, from what ``nvcc --list-gpu-arch`` lists."""
    known = sorted(int(n) for n in re.findall(r"\bcompute_(\d+)\b", listed))
    usual = [n for n in ARCHITECTURES if n in known]
    if not usual:
        raise refuse(
            f"this nvcc knows none of {list(ARCHITECTURES)}: nvcc --list-gpu-arch gives "
            f"{listed.strip()!r}",
            f"CUDA_HOME=/another/toolkit, or {WITHOUT}",
        )
    if not wanted:
        return usual
    if not re.fullmatch(r"\d+(,\d+)*", wanted):
        raise refuse(f"SEG_CUDA_ARCHS is {wanted!r}", "SEG_CUDA_ARCHS=87, or 80,90")
    chosen = sorted({int(n) for n in wanted.split(",")})
    if unknown := [n for n in chosen if n not in known]:
        raise refuse(
            f"SEG_CUDA_ARCHS names {unknown}, which this nvcc does not know; it knows {known}",
            f"CUDA_HOME=/another/toolkit, or {WITHOUT}",
        )
    return chosen


def code_flags(chosen: list[int]) -> list[str]:
    """Machine code for all, and for GPUs to come PTX of the newest."""
    code = {n: f"sm_{n}" for n in chosen}
    code[chosen[-1]] = f"[sm_{chosen[-1]},compute_{chosen[-1]}]"
    return [f"-gencode=arch=compute_{n},code={code[n]}" for n in chosen]


def capabilities(chosen: list[int]) -> str:
    """The same list as the module tells it: "8.7 9.0 9.0+ptx"."""
    names = [f"{n // 10}.{n % 10}" for n in chosen]
    return " ".join([*names, f"{names[-1]}+ptx"])


def folders(plan: str, name: str) -> list[str]:
    """Where this nvcc looks for INCLUDES or LIBRARIES: ``nvcc --dryrun`` tells, wherever it is."""
    line = re.search(rf"^#\$ {name}=(.*)$", plan, re.MULTILINE)
    return [word[2:] for word in shlex.split(line[1] if line else "") if word[:2] in ("-I", "-L")]


class Build(build_ext):
    """Gives .cu files to nvcc, those that have changed."""

    nvcc: tuple[str, ...] = ()  # the command, without files
    nvcc_version = ""

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
        """The object is kept by what it is made of, as pip wants all built afresh every time."""
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


def cuda(nvcc: str) -> Pybind11Extension:
    """runtime._cuda, with the CUDA runtime inside: it can be imported without a driver."""
    Build.nvcc_version = ask(nvcc, "--version")
    cuda_version(Build.nvcc_version)
    chosen = architectures(ask(nvcc, "--list-gpu-arch"), os.environ.get("SEG_CUDA_ARCHS"))
    werror = ("--Werror", "all-warnings") if os.environ.get("SEG_WERROR") else ()
    Build.nvcc = (
        *(nvcc, "-O3", "-std=c++17", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"),
        *(*code_flags(chosen), *werror),
    )
    sources = sorted(glob("runtime/csrc/cuda/*.cu"))
    plan = ask(nvcc, "--dryrun", "-c", sources[0])
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


if __name__ == "__main__":
    nvcc = None if sanitize or os.environ.get("SEG_CUDA") == "0" else find_nvcc()
    if os.environ.get("SEG_CUDA") == "0":
        for path in glob("runtime/_cuda.*.so"):  # of an earlier build, which would still be used
            os.remove(path)
    ParallelCompile("SEG_BUILD_JOBS", default=os.cpu_count() or 1).install()
    setup(
        ext_modules=[core, cuda(nvcc)] if nvcc else [core],
        cmdclass={"build_ext": Build},
        include_package_data=False,
        packages=find_packages(include=["sdk*", "export*", "runtime*", "benchmarks*"]),
        package_data={"runtime": ["_core.pyi", "_cuda.pyi", "py.typed"], "sdk": ["py.typed"]},
    )
