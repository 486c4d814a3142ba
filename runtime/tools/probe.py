"""Facts about this machine for the doctor: packages, drivers, libraries, the Jetson.

A module that may crash on import is imported in a process of its own, so that a crash becomes one
line of the report and does not end the doctor.
"""

from __future__ import annotations

import csv
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime.device import choose, driver
from runtime.engines.onnx_runtime import telemetry_off
from runtime.errors import MissingBackend, SdkError
from runtime.files import cache_folder

DISTRIBUTION = "dynaguide-edge"
OURS = ("sdk", "export", "runtime", "benchmarks")
MODULES = ("cv2", "onnxruntime", "tensorrt", "tensorrt_rtx", "pycuda")
_JETPACKS = {
    35: "JetPack 5: its TensorRT 8 is too old",
    36: "JetPack 6: TensorRT 10.3",
    38: "JetPack 7: TensorRT 10, or 11.4.1 and later from JetPack 7.2.2 on",
}
_CPUFREQ = Path("/sys/devices/system/cpu/cpufreq")
_SECONDS = 60  # time limit of one command
# A program that imports the module {name} and prints facts about the module as JSON, or null if the
# module is not installed. It prints them again after it has tried to start TensorRT, which may end
# the program.
_PROBE = """
import json, sys
try:
    import {name} as module
except ModuleNotFoundError as error:
    if error.name != "{name}".partition(".")[0]:
        raise
    print("null")
    sys.exit()
if getattr(module, "__file__", None) is None:  # a folder without a module
    raise ImportError(f"{{list(module.__path__)}} does not contain it")
try:
    with open("/proc/self/maps", errors="replace") as maps:
        mapped = sorted({{line.split(None, 5)[5].strip() for line in maps if ".so" in line}})
except OSError:
    mapped = []
facts = {{
    "state": "ready",
    "version": str(getattr(module, "__version__", "")),
    "file": getattr(module, "__file__", None),
    "providers": getattr(module, "get_available_providers", list)(),
    "build": getattr(module, "getBuildInformation", str)(),
    "mapped": mapped,
}}
print(json.dumps(facts), flush=True)
if hasattr(module, "Builder"):
    sys.path.append({folder!r})
    from runtime.engines.tensorrt import make
    from runtime.errors import DeviceError
    try:
        make(module, "Builder")
    except DeviceError as error:
        facts |= {{"state": "unstarted", "error": error.message, "fix": error.fix}}
    print()
    print(json.dumps(facts))
"""


def owners_of_modules() -> dict[str, dict[str, str]]:
    """Map each import name to the distributions that install it, each with its version."""
    owners: dict[str, dict[str, str]] = {}
    for installed in metadata.distributions():
        try:
            name, version = installed.metadata["Name"], installed.version
            top = (installed.read_text("top_level.txt") or "").split()
            if not top:
                top = [f.parts[0].removesuffix(".py") for f in installed.files or () if f.parts]
        except (KeyError, TypeError, ValueError, OSError, csv.Error):
            continue  # skip metadata that an uninstalled package has left behind
        if name:
            for module in set(top):
                plain = re.sub(r"[-_.]+", "-", name).lower()
                owners.setdefault(module, {}).setdefault(plain, version)
    return owners


def package_facts(owners: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Describe this package: its version, its folder, the instruction sets of its core, and why the
    core cannot be used."""
    facts: dict[str, Any] = {
        "version": owners.get("runtime", {}).get(DISTRIBUTION),
        "folder": str(Path(__file__).parents[1]),
        "SEG_ISA": os.environ.get("SEG_ISA"),
        "isas": [],
        "isa": None,
        "error": "",
        "fix": "",
    }
    try:
        facts["isas"], facts["isa"] = choose.isas(), choose.isa()
    except SdkError as error:
        facts["error"], facts["fix"] = error.message, error.fix
    return facts


def module_facts(owners: dict[str, dict[str, str]], with_driver: bool) -> dict[str, Any]:
    """Import each of MODULES in a process of its own and describe the result.

    Parameters
    ----------
    owners : from :func:`owners_of_modules`.
    with_driver : import PyCUDA's native part too, which needs a CUDA driver.
    """
    names = [f"{n}.driver" if n == "pycuda" and with_driver else n for n in MODULES]
    with ThreadPoolExecutor(2) as pool:
        probed = list(pool.map(probe, names))
    for name, facts in zip(MODULES, probed, strict=True):
        facts["distributions"] = owners.get(name, {})
        facts["version"] = facts["version"] or next(iter(facts["distributions"].values()), "")
    facts = dict(zip(MODULES, probed, strict=True))
    facts["onnxruntime"]["unresolved"] = _unresolved(facts["onnxruntime"]["file"])
    facts["cv2"]["features"] = _opencv_features(facts["cv2"].get("build", ""))
    for module in facts.values():
        module.pop("build", None)
    return facts


def probe(name: str) -> dict[str, Any]:
    """Import a module in a process of its own, and let TensorRT start there: make its builder.

    Returns
    -------
    "state" ("ready", "absent", "broken", or "unstarted" if it can be imported but TensorRT does not
    start), "version", "file", "providers" (of ONNX Runtime), "build" (OpenCV's build information),
    "mapped" (the libraries that the process has loaded), "error", and "fix" if TensorRT's error
    contains one.
    """
    facts: dict[str, Any] = {"state": "broken", "version": "", "file": None, "error": ""}
    facts |= {"providers": [], "mapped": [], "fix": ""}
    folder = str(Path(__file__).parents[2])
    telemetry_off()
    code, output, errors = run([sys.executable, "-c", _PROBE.format(name=name, folder=folder)])
    try:
        answer = json.loads(_last_line(output))
    except ValueError:
        answer = {}
    if code:
        what = "starting it" if answer else "the import"
        facts["error"] = _last_line(errors) or f"{what} ended with exit code {code}"
        if code < 0:
            facts["error"] = f"{what} is ended by {_signal_name(-code)}"
        return facts | (answer or {}) | {"state": "unstarted" if answer else "broken"}
    if answer is None:
        return facts | {"state": "absent"}
    return facts | (answer or {"error": "the import ends the interpreter"})


def _opencv_features(build: str) -> str:
    """Say whether OpenCV has windows and GStreamer, by the text of its getBuildInformation."""
    found = dict(re.findall(r"^ *(GUI|GStreamer): +(\S+)", build, re.MULTILINE))
    windows = "no windows (headless)" if found.get("GUI") == "NONE" else "windows"
    gstreamer = "GStreamer" if found.get("GStreamer") == "YES" else "no GStreamer"
    return f"{windows}, {gstreamer}" if len(found) == 2 else ""


def _unresolved(onnxruntime: str | None) -> list[str]:
    """List the libraries that ONNX Runtime's CUDA provider needs and the loader does not find."""
    if onnxruntime is None:
        return []
    provider = Path(onnxruntime).parent / "capi/libonnxruntime_providers_cuda.so"
    return [name for name, path in _links(provider) if path is None]


def cuda_facts() -> dict[str, Any]:
    """Describe the CUDA driver and its GPUs, or say why no GPU can be used."""
    facts: dict[str, Any] = {"driver": driver.cuda_driver_version(), "devices": []}
    problem = driver.cuda_problem()
    try:
        facts["devices"] = [asdict(gpu) for gpu in driver.cuda_devices()]
    except SdkError as error:
        problem = error
    facts["absence"] = problem.message if problem else ""
    facts["fix"] = problem.fix if problem else ""
    facts["broken"] = problem is not None and not isinstance(problem, MissingBackend)
    return facts


def cuda_module_facts(cuda: dict[str, Any]) -> dict[str, Any]:
    """Describe runtime._cuda: its architectures, the GPUs that can run it, and why others cannot.

    Parameters
    ----------
    cuda : from :func:`cuda_facts`.
    """
    facts: dict[str, Any] = {"built": False, "compiled": [], "runs_on": [], "refused": []}
    facts |= {"error": "", "fix": "", "broken": False}
    try:
        module = choose.cuda_module()
    except MissingBackend as error:
        broken = not isinstance(error.__cause__, ModuleNotFoundError)
        return facts | {"error": error.message, "fix": error.fix, "broken": broken}
    facts |= {"built": True, "compiled": module.architectures()}
    old = driver.old_driver(module.runtime_version())
    for gpu in cuda["devices"]:
        if old:
            facts["refused"].append({"why": old.message, "fix": old.fix})
            continue
        why = driver.no_code_for(driver.CudaDevice(**gpu), facts["compiled"])
        if why:
            fix = driver.build_for(gpu["compute_capability"])
            facts["refused"].append({"why": why, "fix": fix})
        else:
            facts["runs_on"].append(f"cuda:{gpu['index']}")
    return facts


def trtexec_facts() -> dict[str, Any] | None:
    """Find the program trtexec and the TensorRT library that it links.

    Returns
    -------
    "path" and "library"; None if this machine has no trtexec. The library is None if trtexec links
    none: newer versions load TensorRT when they run.
    """
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/src/tensorrt/bin"])
    path = shutil.which("trtexec", path=places)
    if path is None:
        return None
    linked = (found for _, found in _links(Path(path)) if found and _family(found))
    return {"path": path, "library": next(linked, None)}


def library_facts(modules: dict[str, Any], trtexec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """List the TensorRT libraries of this machine.

    Returns
    -------
    Of each library: "path", "family" ("libnvinfer" or "libtensorrt_rtx"), "version" or None,
    "found_by" (the search paths that contain it) and "loaded_by" (what loads it: Python modules,
    trtexec, this process).
    """
    found: dict[str, dict[str, Any]] = {}

    def add(path: str, key: str, who: str) -> None:
        family = _family(path)
        if not family or not os.path.isfile(path):
            return
        real = os.path.realpath(path)
        if real not in found:
            found[real] = {"path": real, "family": family, "version": _library_version(real)}
            found[real] |= {"found_by": [], "loaded_by": []}
        if who not in found[real][key]:
            found[real][key].append(who)

    for name, facts in modules.items():
        for path in facts["mapped"]:
            add(path, "loaded_by", name)
    if trtexec and trtexec["library"]:
        add(trtexec["library"], "loaded_by", "trtexec")
    for path in mapped_libraries():
        add(path, "loaded_by", "this process")
    for folder in filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")):
        for path in _files(folder, "lib*.so*"):
            add(path, "found_by", "LD_LIBRARY_PATH")
    for folder in filter(None, sys.path):
        for path in _files(folder, "tensorrt*/lib*.so*"):
            add(path, "found_by", "wheel")
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/sbin", "/usr/sbin"])
    _, output, _ = run([shutil.which("ldconfig", path=places) or "ldconfig", "-p"])
    for line in output.splitlines():
        add(line.partition(" => ")[2], "found_by", "ldconfig")
    return list(found.values())


def _family(path: str) -> str | None:
    """Return "libnvinfer" or "libtensorrt_rtx" for a file of that library, else None."""
    found = re.match(r"(libnvinfer|libtensorrt_rtx)\.so", os.path.basename(path))
    return found[1] if found else None


def _library_version(path: str) -> str | None:
    """Return the version in the library's version symbol, else the one in its file name, else None.

    TensorRT exports a symbol such as tensorrt_version_10_3_0_26.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = re.search(rb"tensorrt_version_(\d+(?:_\d+){2,3})\0", data)
            if found:
                return found[1].decode().replace("_", ".")
    except (OSError, ValueError):  # unreadable, or empty
        return None
    named = re.search(r"\.so\.(\d+(?:\.\d+){2,3})$", path)
    return named[1] if named else None


def jetson() -> dict[str, Any] | None:
    """Describe the Jetson; None if this machine is not a Jetson.

    Returns
    -------
    "model", "l4t" (the release), "jetpack" (a text), "power_mode" (None if unknown) and
    "clocks_locked" (whether the user has run jetson_clocks; None if unknown).
    """
    model, release = driver.jetson_model(), driver.l4t()
    if model is None and release is None:
        return None
    line = _JETPACKS.get(int(release.split(".")[0])) if release else None
    _, output, _ = run(["nvpmodel", "-q"])
    mode = re.search(r"NV Power Mode: *(\S+)", output)
    return {
        "model": model,
        "l4t": release,
        "jetpack": line or "a JetPack that this version does not know",
        "power_mode": mode[1] if mode else None,
        "clocks_locked": _clocks_locked(),
    }


def _clocks_locked() -> bool | None:
    """Whether the lowest frequency of every CPU is its highest, as jetson_clocks sets it; None if
    the machine does not state its frequencies."""
    try:
        policies = sorted(_CPUFREQ.glob("policy*"))
        ends = [[(p / f"scaling_{e}_freq").read_text() for e in ("min", "max")] for p in policies]
    except OSError:
        return None
    return all(low == high for low, high in ends) if ends else None


def cache_facts() -> dict[str, str]:
    """Return the cache "folder", and as "error" why no file can be created in it, or ""."""
    folder = cache_folder()
    if folder is None:
        return {"folder": "", "error": "there is no home folder"}
    try:
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as error:
        return {"folder": str(folder), "error": f"{folder} cannot be written: {error}"}
    return {"folder": str(folder), "error": ""}


def run(command: list[str]) -> tuple[int, str, str]:
    """Run a command with a time limit of 60 s.

    Returns
    -------
    Exit code, stdout and stderr; code 124 after the time limit, and 127 if it cannot be started.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            check=False,
            timeout=_SECONDS,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"{Path(command[0]).name} did not finish in {_SECONDS} s"
    except (OSError, ValueError) as error:
        return 127, "", str(error)
    return (
        done.returncode,
        done.stdout.decode(errors="replace"),
        done.stderr.decode("utf-8", "replace"),
    )


def _links(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield the name and the path of each library that a program or library needs. The path is None
    if the loader does not find the library."""
    if os.path.isfile(path):
        _, output, _ = run(["ldd", str(path)])
        for name, place in re.findall(r"^\s*(\S+) => (not found|\S+)", output, re.MULTILINE):
            yield name, None if place == "not found" else place


def mapped_libraries() -> list[str]:
    """List the shared libraries that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [line.split(None, 5)[5] for line in lines if ".so" in line]


def _files(folder: str, pattern: str) -> list[str]:
    try:
        return sorted(map(str, Path(folder).glob(pattern)))
    except (OSError, ValueError):
        return []


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
