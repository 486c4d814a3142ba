"""Choose whether runtime._cuda is built, and for which GPUs. setup.py builds it.

    python setup_cuda.py

prints the choice in one line. The Makefile runs this command before pip, because pip hides the
output of setup.py. This file needs only the standard library.

Environment variables decide first:

    SEG_CUDA=0              builds without CUDA, and removes runtime._cuda of an earlier build
    SEG_CUDA=1              builds for all ARCHITECTURES that nvcc knows
    SEG_CUDA_ARCHS=80,87    builds for these compute capabilities: 87 is 8.7

Without these variables, runtime._cuda is built for the GPUs of this machine. If the machine has no
GPU but an earlier build is in runtime/, runtime._cuda is built again for the compute capabilities
of that build; otherwise for those that SEG_CUDA_WITHOUT_GPU lists, as 75 in `make test`; otherwise
it is not built.

nvcc is searched in $CUDA_HOME/bin, $CUDA_PATH/bin, PATH and /usr/local/cuda/bin.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 110, 120)  # 87 is compute capability 8.7
OLDEST = (11, 4)  # version of the CUDA toolkit
WITHOUT = "SEG_CUDA=0 builds without CUDA"
COMPILER = "if nvcc refuses the C++ compiler, name another: NVCC_PREPEND_FLAGS='-ccbin g++-12'"
TOOLKIT = f"the CUDA toolkit, version {OLDEST[0]}.{OLDEST[1]} or newer"
DRIVER_LIMIT = 5.0  # seconds that the driver may take to describe the GPUs

# A program that prints, as JSON, the name and the compute capability of each GPU, or a sentence
# that says why no GPU can be used. The numbers are those of cuda.h.
FIND_GPUS = """
import ctypes, json
NO_DEVICE, MAJOR, MINOR = 100, 75, 76

def ask():
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver was found"
    code = driver.cuInit(0)
    if code == NO_DEVICE:
        return "the CUDA driver finds no GPU"
    if code:
        return f"the CUDA driver does not start: cuInit returns {code}"
    count, device, number = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if code := driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"the CUDA driver fails: cuDeviceGetCount returns {code}"
    found = []
    for i in range(count.value):
        name, capability = ctypes.create_string_buffer(256), 0
        calls = [("cuDeviceGet", device, i), ("cuDeviceGetAttribute", number, MAJOR, device),
                 ("cuDeviceGetAttribute", number, MINOR, device)]
        for call, out, *more in calls:
            if code := getattr(driver, call)(ctypes.byref(out), *more):
                return f"the CUDA driver fails: {call} returns {code}"
            if call == "cuDeviceGetAttribute":
                capability = 10 * capability + number.value
        driver.cuDeviceGetName(name, len(name), device)
        found.append([name.value.decode(errors="replace") or "a GPU", capability])
    return found or "the CUDA driver finds no GPU"

print(json.dumps(ask()), flush=True)
"""

# A program that prints the compute capabilities of a built module's code, as JSON.
READ_MODULE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps(module.architectures()))
"""


@dataclass(frozen=True)
class Choice:
    """Whether and how runtime._cuda is built. ``line`` says what was chosen and why.
    ``architectures`` is sorted. If nothing is built, it is empty and ``nvcc`` is None. ``removed``
    are files of earlier builds that setup.py deletes, because they would still be imported."""

    line: str
    architectures: tuple[int, ...] = ()
    nvcc: str | None = None
    nvcc_version: str = ""  # the output of ``nvcc --version``
    removed: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine. Compute capability 8.7 is 87."""

    name: str
    capability: int

    def __str__(self) -> str:
        return f"{self.name}, {dotted(self.capability)}"


def refuse(what: str, fix: str) -> SystemExit:
    """The exception that ends a build; its text says what is wrong, and the fix."""
    return SystemExit(f"dynaguide-edge: {what}\n  fix: {fix}")


# nvcc


def find_nvcc() -> str | None:
    """The path of nvcc, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", os.defpath)]
    return shutil.which("nvcc", path=os.pathsep.join([*places, "/usr/local/cuda/bin"]))


def ask(*command: str) -> str:
    """The output of a command: its stdout, then its stderr.

    Raises
    ------
    SystemExit : the command cannot be run, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise refuse(f"{command[0]} cannot be run: {error.strerror}", WITHOUT) from error
    if done.returncode:
        words = (done.stderr + done.stdout).strip()
        raise refuse(f"{' '.join(command)} fails: {words}", f"{WITHOUT}; {COMPILER}")
    return done.stdout + done.stderr


def cuda_version(printed: str) -> tuple[int, int]:
    """The version of the CUDA toolkit. ``printed`` is the output of ``nvcc --version``.

    Raises
    ------
    SystemExit : the toolkit is older than OLDEST.
    """
    found = re.search(r"release (\d+)\.(\d+)", printed)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < OLDEST:
        raise refuse(
            f"this nvcc is too old, wanted CUDA {OLDEST[0]}.{OLDEST[1]} or newer: "
            f"{printed.strip()}",
            f"CUDA_HOME=/a/newer/toolkit, or {WITHOUT}",
        )
    return version


def known_architectures(listed: str) -> list[int]:
    """The architectures that nvcc knows, sorted, from the output of ``nvcc --list-gpu-arch``."""
    return sorted(int(n) for n in re.findall(r"\bcompute_(\d+)\b", listed))


def architectures(listed: str, wanted: str | None, name: str = "SEG_CUDA_ARCHS") -> list[int]:
    """The architectures to build for, sorted.

    Parameters
    ----------
    listed : the output of ``nvcc --list-gpu-arch``.
    wanted : "80,87"; None or "" means all of ARCHITECTURES that nvcc knows.
    name : the name of the environment variable whose value is ``wanted``.

    Raises
    ------
    SystemExit : ``wanted`` is malformed, or names an architecture that nvcc does not know; or nvcc
        knows none of ARCHITECTURES.
    """
    known = known_architectures(listed)
    usual = [n for n in ARCHITECTURES if n in known]
    if not usual:
        raise refuse(
            f"this nvcc knows none of {list(ARCHITECTURES)}: nvcc --list-gpu-arch prints "
            f"{listed.strip()!r}",
            f"CUDA_HOME=/another/toolkit, or {WITHOUT}",
        )
    if not wanted:
        return usual
    if not re.fullmatch(r"\d+(,\d+)*", wanted):
        raise refuse(f"{name} is {wanted!r}; wanted a list such as 80,87", f"{name}=87, or 80,90")
    chosen = sorted({int(n) for n in wanted.split(",")})
    if unknown := [n for n in chosen if n not in known]:
        raise refuse(
            f"{name} names {unknown}, which this nvcc does not know; it knows {known}",
            f"CUDA_HOME=/another/toolkit, or {WITHOUT}",
        )
    return chosen


def for_gpus(gpus: list[Gpu], known: list[int]) -> list[int]:
    """The architectures to build for, so that the code runs on ``gpus``. For each GPU it is the
    newest of ``known`` that is not newer than the GPU: the GPU's own, unless nvcc does not know it.
    GPUs that are older than all ARCHITECTURES are left out."""
    usable = [n for n in known if n >= ARCHITECTURES[0]]
    nearest = (max((n for n in usable if n <= gpu.capability), default=0) for gpu in gpus)
    return sorted({n for n in nearest if n})


# GPUs


def find_gpus() -> tuple[list[Gpu], str]:
    """The GPUs of this machine, and a text that says why none is found; one of the two is empty.

    A child process asks the CUDA driver, because a broken driver may crash or never answer. After
    DRIVER_LIMIT seconds the child is killed. This function does not wait until the child has ended.
    """
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", FIND_GPUS],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        printed, _ = child.communicate(timeout=DRIVER_LIMIT)
    except subprocess.TimeoutExpired:
        child.kill()  # without a wait: a process that hangs in the kernel does not end
        return [], f"the CUDA driver did not answer within {DRIVER_LIMIT:g} s"
    try:
        found = json.loads(printed)
    except ValueError:
        return [], "the CUDA driver cannot describe the GPUs"
    if isinstance(found, str):
        return [], found
    return [Gpu(name, capability) for name, capability in found], ""


# An earlier build


def earlier_module() -> Path | None:
    """The file of runtime._cuda that an earlier build for this Python left in runtime/, or None."""
    path = ROOT / "runtime" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    return path if path.exists() else None


def built_for(module: Path) -> list[int]:
    """The architectures that a built module has code for, sorted; empty if it cannot be loaded."""
    command = [sys.executable, "-I", "-c", READ_MODULE, str(module)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        return []
    names = (name for name in json.loads(done.stdout) if not name.endswith("+ptx"))
    return sorted(int(name.replace(".", "")) for name in names)


# The choice


def choose() -> Choice:
    """Choose whether and how runtime._cuda is built.

    Raises
    ------
    SystemExit : an environment variable is malformed or names what cannot be built; or nvcc is
        needed and fails or is too old.
    """
    wish, wanted = os.environ.get("SEG_CUDA", ""), os.environ.get("SEG_CUDA_ARCHS", "")
    if wish == "0":
        old = tuple(map(Path, sorted(glob.glob(f"{glob.escape(str(ROOT))}/runtime/_cuda.*.so"))))
        removed = "; runtime._cuda of an earlier build is removed" if old else ""
        return Choice(f"no, because SEG_CUDA=0{removed}", removed=old)
    if os.environ.get("SEG_SANITIZE"):
        return Choice("no, because SEG_SANITIZE is set")
    if wish not in ("", "1"):
        raise refuse(
            f"SEG_CUDA is {wish!r}; wanted 0 or 1",
            "SEG_CUDA=0 (without CUDA), or SEG_CUDA=1 (all GPUs)",
        )
    if wish or wanted:
        reason = f"SEG_CUDA_ARCHS={wanted}" if wanted else "SEG_CUDA=1"
        nvcc = find_nvcc()
        if nvcc is None:
            raise refuse(
                f"{reason} needs nvcc, which was not found",
                f"install {TOOLKIT}; or set CUDA_HOME; or {WITHOUT}",
            )
        version, listed = _ask_nvcc(nvcc)
        return _yes(architectures(listed, wanted), f"because {reason}", nvcc, version)
    gpus, why = find_gpus()
    return _choose_for(gpus) if gpus else _choose_without_gpu(why)


def _choose_for(gpus: list[Gpu]) -> Choice:
    """The choice for the GPUs of this machine."""
    kinds = list(dict.fromkeys(gpus))
    has = "has a GPU" if len(gpus) == 1 else f"has {len(gpus)} GPUs"
    seen = f"this machine {has} ({'; '.join(map(str, kinds))})"
    nvcc, old = find_nvcc(), earlier_module()
    if nvcc is None:
        return Choice(
            f"no, because nvcc was not found, although {seen}; fix: install {TOOLKIT}, or set "
            f"CUDA_HOME, and repeat this command{_unchanged(old)}"
        )
    version, listed = _ask_nvcc(nvcc)
    known = known_architectures(listed)
    chosen = for_gpus(gpus, known)
    release = "CUDA {}.{}".format(*cuda_version(version))
    if not chosen:
        return Choice(
            f"no: {seen}, but the CUDA core needs compute capability {dotted(ARCHITECTURES[0])} or "
            f"newer, and nvcc of {release} builds for {dotted(known[0])} or newer{_unchanged(old)}"
        )
    why = f"because {seen}"
    if left := [gpu for gpu in kinds if not for_gpus([gpu], known)]:
        why += f"; without code for {'; '.join(map(str, left))}, which is too old"
    if newer := [gpu for gpu in kinds if gpu not in left and gpu.capability not in known]:
        why += f"; nvcc of {release} does not know {'; '.join(map(str, newer))}, so the driver "
        why += "compiles the code for it when it is used"
    had = built_for(old) if old else []
    if had and had != chosen:
        why += f"; this replaces an earlier build for {_listed(had)}"
    return _yes(chosen, why, nvcc, version)


def _choose_without_gpu(why: str) -> Choice:
    """The choice for a machine without a GPU; ``why`` says why no GPU was found."""
    nvcc, old = find_nvcc(), earlier_module()
    if nvcc is None:
        return Choice(f"no, because {why}, and nvcc was not found{_unchanged(old)}")
    had, wanted = built_for(old) if old else [], os.environ.get("SEG_CUDA_WITHOUT_GPU", "")
    if had or wanted:
        version, listed = _ask_nvcc(nvcc)
        if again := [n for n in had if n in known_architectures(listed)]:
            return _yes(again, f"as in the earlier build in runtime/; {why}", nvcc, version)
        if wanted:
            chosen = architectures(listed, wanted, "SEG_CUDA_WITHOUT_GPU")
            reason = f"because SEG_CUDA_WITHOUT_GPU={wanted}; {why}"
            return _yes(chosen, reason, nvcc, version)
    return Choice(
        f"no, because {why}{_unchanged(old)}; SEG_CUDA_ARCHS=87 builds it for compute capability "
        "8.7, SEG_CUDA=1 for all GPUs"
    )


def _ask_nvcc(nvcc: str) -> tuple[str, str]:
    """The outputs of ``nvcc --version``, which must be OLDEST or newer, and of
    ``nvcc --list-gpu-arch``."""
    version = ask(nvcc, "--version")
    cuda_version(version)
    return version, ask(nvcc, "--list-gpu-arch")


def _yes(chosen: list[int], why: str, nvcc: str, version: str) -> Choice:
    """The choice to build for the architectures ``chosen``."""
    line = f"yes, for compute capability {_listed(chosen)}, {why}"
    return Choice(line, tuple(chosen), nvcc, version)


def _unchanged(old: Path | None) -> str:
    """The end of a line for a choice against a build: an earlier build, if any, is not changed."""
    return f"; {old.name} of an earlier build is not changed, SEG_CUDA=0 removes it" if old else ""


def _listed(chosen: list[int]) -> str:
    return ", ".join(map(dotted, chosen))


def dotted(capability: int) -> str:
    """A compute capability as a text: "8.7" for 87."""
    return f"{capability // 10}.{capability % 10}"


if __name__ == "__main__":
    print(f"CUDA core: {choose().line}")
