"""What this machine has for running and building bundles, what it lacks, and how to mend it.

:func:`report` gathers facts, judges them, and never raises. Libraries that may crash on import are
imported in processes of their own, so that a bad one is a line of the report and not its end.
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

import numpy as np

from runtime.device import choose, driver
from runtime.errors import MissingBackend, SdkError

_DISTRIBUTION = "dynaguide-edge"
_OURS = ("sdk", "export", "runtime", "benchmarks")
_MODULES = ("cv2", "onnxruntime", "tensorrt", "tensorrt_rtx", "pycuda")
_TITLES = {
    "cv2": "OpenCV",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT for RTX",
    "pycuda": "PyCUDA",
}
_TENSORRT = ((10, 3), (12,))  # from, below
_RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_JETPACKS = {
    35: "JetPack 5: its TensorRT 8 is too old",
    36: "JetPack 6: TensorRT 10.3",
    38: "JetPack 7: TensorRT 11.4 from JetPack 7.2.2 on",
}
_CPUFREQ = Path("/sys/devices/system/cpu/cpufreq")
_SECONDS = 60  # most for one command

# Imports {name} and says what came of it: nothing when it is not installed.
_PROBE = """
import json, sys
try:
    import {name} as module
except ModuleNotFoundError as error:
    if error.name != "{name}".partition(".")[0]:
        raise
    print("null")
    sys.exit()
try:
    with open("/proc/self/maps", errors="replace") as maps:
        mapped = sorted({{line.split(None, 5)[5].strip() for line in maps if ".so" in line}})
except OSError:
    mapped = []
print(json.dumps({{
    "version": str(getattr(module, "__version__", "")),
    "file": getattr(module, "__file__", None),
    "providers": getattr(module, "get_available_providers", list)(),
    "mapped": mapped,
}}))
"""


def report() -> dict[str, Any]:
    """Facts about this machine and a judgement of them; JSON can hold it.

    Returns
    -------
    package, python, modules, cuda, cuda_module, libraries, trtexec, jetson, owners, cache : the
        facts.
    targets : name -> {"ready": bool, "why": str, "fix": str}: what can be run and built here.
    problems : [{"kind", "what", "fix"}]. Kind is "missing" (not installed, may not be wanted),
        "clash" (installed twice, or in versions that differ) or "broken" (installed and failing).
    """
    owners = owners_of_modules()
    cuda = _cuda()
    modules = _modules(owners, with_driver=not cuda["absence"])
    trtexec = _trtexec()
    facts = {
        "package": _package(owners),
        "python": {
            "version": sys.version.split()[0],
            "executable": sys.executable,
            "platform": driver.platform_tag(),
            "numpy": np.__version__,
        },
        "modules": modules,
        "cuda": cuda,
        "cuda_module": _cuda_module(cuda),
        "libraries": _libraries(modules, trtexec),
        "trtexec": trtexec,
        "jetson": jetson(),
        "owners": {name: sorted(owners.get(name, {})) for name in _OURS},
        "cache": _cache(),
    }
    return facts | {"targets": _targets(facts), "problems": _problems(facts)}


# Facts


def owners_of_modules() -> dict[str, dict[str, str]]:
    """Import name -> the distributions that install it, each with its version."""
    owners: dict[str, dict[str, str]] = {}
    for installed in metadata.distributions():
        try:
            name, version = installed.metadata["Name"], installed.version
            top = (installed.read_text("top_level.txt") or "").split()
            if not top:
                top = [f.parts[0].removesuffix(".py") for f in installed.files or () if f.parts]
        except (KeyError, TypeError, ValueError, OSError, csv.Error):
            continue  # the remains of an uninstalled package own nothing
        if name:
            for module in set(top):
                plain = re.sub(r"[-_.]+", "-", name).lower()
                owners.setdefault(module, {}).setdefault(plain, version)
    return owners


def _package(owners: dict[str, dict[str, str]]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "version": owners.get("runtime", {}).get(_DISTRIBUTION),
        "folder": str(Path(__file__).parent),
        "isa": os.environ.get("SEG_ISA"),
        "targets": [],
        "target": None,
        "error": "",
        "fix": "",
    }
    try:
        facts["targets"], facts["target"] = choose.targets(), choose.target()
    except SdkError as error:
        facts["error"], facts["fix"] = _sentence(error), error.fix
    return facts


def _modules(owners: dict[str, dict[str, str]], with_driver: bool) -> dict[str, Any]:
    """What importing each module gives; PyCUDA's own library can be loaded beside a driver only."""
    names = [f"{n}.driver" if n == "pycuda" and with_driver else n for n in _MODULES]
    with ThreadPoolExecutor(2) as pool:
        probed = list(pool.map(_probe, names))
    for name, facts in zip(_MODULES, probed, strict=True):
        facts["distributions"] = owners.get(name, {})
        facts["version"] = facts["version"] or next(iter(facts["distributions"].values()), "")
    facts = dict(zip(_MODULES, probed, strict=True))
    facts["onnxruntime"]["unresolved"] = _unresolved(facts["onnxruntime"]["file"])
    return facts


def _probe(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"state": "broken", "version": "", "file": None, "error": ""}
    facts |= {"providers": [], "mapped": []}
    code, output, errors = _run([sys.executable, "-c", _PROBE.format(name=name)])
    if code:
        facts["error"] = _last_line(errors) or f"it ended with {code}"
        if code < 0:
            facts["error"] = f"importing it is ended by {_signal_name(-code)}"
        return facts
    try:
        answer = json.loads(_last_line(output))
    except ValueError:
        return facts | {"error": "importing it ends the interpreter"}
    return facts | ({"state": "absent"} if answer is None else {"state": "ready"} | answer)


def _unresolved(onnxruntime: str | None) -> list[str]:
    """Libraries that ONNX Runtime's CUDA provider needs and the loader does not find."""
    if onnxruntime is None:
        return []
    provider = Path(onnxruntime).parent / "capi/libonnxruntime_providers_cuda.so"
    return [name for name, path in _links(provider) if path is None]


def _cuda() -> dict[str, Any]:
    facts: dict[str, Any] = {"driver": driver.cuda_driver_version(), "devices": []}
    problem = driver.cuda_problem()
    try:
        facts["devices"] = [asdict(gpu) for gpu in driver.cuda_devices()]
    except SdkError as error:
        problem = error
    facts["absence"] = _sentence(problem) if problem else ""
    facts["fix"] = problem.fix if problem else ""
    facts["broken"] = problem is not None and not isinstance(problem, MissingBackend)
    return facts


def _cuda_module(cuda: dict[str, Any]) -> dict[str, Any]:
    """What runtime._cuda is compiled for, on which GPUs it runs, and why not on the others."""
    facts: dict[str, Any] = {"built": False, "compiled": [], "runs_on": [], "refused": []}
    facts |= {"error": "", "fix": "", "broken": False}
    try:
        module = choose.cuda_module()
    except MissingBackend as error:
        broken = not isinstance(error.__cause__, ModuleNotFoundError)
        return facts | {"error": _sentence(error), "fix": error.fix, "broken": broken}
    facts |= {"built": True, "compiled": module.architectures()}
    old = driver.old_driver(module.runtime_version())
    for gpu in cuda["devices"]:
        if old:
            facts["refused"].append({"why": _sentence(old), "fix": old.fix})
            continue
        why = driver.no_code_for(driver.CudaDevice(**gpu), facts["compiled"])
        if why:
            fix = driver.build_for(gpu["compute_capability"])
            facts["refused"].append({"why": why, "fix": fix})
        else:
            facts["runs_on"].append(f"cuda:{gpu['index']}")
    return facts


def _trtexec() -> dict[str, Any] | None:
    """Where trtexec is and the TensorRT it links; newer ones link none and open it when run."""
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/src/tensorrt/bin"])
    path = shutil.which("trtexec", path=places)
    if path is None:
        return None
    linked = (found for _, found in _links(Path(path)) if found and _family(found))
    return {"path": path, "library": next(linked, None)}


def _libraries(modules: dict[str, Any], trtexec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Each TensorRT library on this machine: its version, how it is found, and who loads it."""
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
    for path in _mapped():
        add(path, "loaded_by", "this process")
    for folder in filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")):
        for path in _files(folder, "lib*.so*"):
            add(path, "found_by", "LD_LIBRARY_PATH")
    for folder in filter(None, sys.path):
        for path in _files(folder, "tensorrt*/lib*.so*"):
            add(path, "found_by", "wheel")
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/sbin", "/usr/sbin"])
    _, output, _ = _run([shutil.which("ldconfig", path=places) or "ldconfig", "-p"])
    for line in output.splitlines():
        add(line.partition(" => ")[2], "found_by", "ldconfig")
    return list(found.values())


def _family(path: str) -> str | None:
    found = re.match(r"(libnvinfer|libtensorrt_rtx)\.so", os.path.basename(path))
    return found[1] if found else None


def _library_version(path: str) -> str | None:
    """The version that the library exports as a symbol, else the one in its file's name."""
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
    """Model, L4T release, JetPack line, power mode and whether jetson_clocks has run; None where
    this is no Jetson."""
    model, release = driver.jetson_model(), driver.l4t()
    if model is None and release is None:
        return None
    line = _JETPACKS.get(int(release.split(".")[0])) if release else None
    _, output, _ = _run(["nvpmodel", "-q"])
    mode = re.search(r"NV Power Mode: *(\S+)", output)
    return {
        "model": model,
        "l4t": release,
        "jetpack": line or "not a JetPack line that this version knows",
        "power_mode": mode[1] if mode else None,
        "clocks_locked": _clocks_locked(),
    }


def _clocks_locked() -> bool | None:
    """Whether jetson_clocks has run, which sets the least frequency to the greatest."""
    try:
        policies = sorted(_CPUFREQ.glob("policy*"))
        ends = [[(p / f"scaling_{e}_freq").read_text() for e in ("min", "max")] for p in policies]
    except OSError:
        return None
    return all(low == high for low, high in ends) if ends else None


def _cache() -> dict[str, str]:
    """The cache folder, and why it cannot be written. Nothing is left behind."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not folder.is_absolute():  # the convention is to ignore such a value
            folder = Path.home() / ".cache"
    except RuntimeError as error:
        return {"folder": "", "error": f"there is no home folder: {error}"}
    folder /= _DISTRIBUTION
    try:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, ValueError) as error:
        return {"folder": str(folder), "error": f"{folder} cannot be written: {error}"}
    return {"folder": str(folder), "error": ""}


# Judgement


def _targets(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each target with the first need that is not met."""
    onnx, gpu = _need(facts, "onnxruntime"), _need_gpu(facts)
    rtx, pycuda = _need(facts, "tensorrt_rtx"), _need(facts, "pycuda")
    core = (facts["package"]["error"], facts["package"]["fix"])
    needs = {
        "cpu": [core, _need(facts, "cv2")],
        "cuda": [core, _need(facts, "cv2"), gpu, _need_cuda_module(facts)],
        "onnx": [onnx],
        "onnx on cuda": [onnx, gpu, _need_provider(facts)],
        "rtx build": [rtx],
        "rtx run": [rtx, gpu, _need_rtx_gpu(facts), pycuda],
        "trt": [_need_tensorrt(facts), gpu, pycuda],
    }
    verdicts = {}
    for name, unmet in needs.items():
        why, fix = next(((w, f) for w, f in unmet if w), ("", ""))
        verdicts[name] = {"ready": not why, "why": why, "fix": fix}
    return verdicts


def _need(facts: dict[str, Any], name: str) -> tuple[str, str]:
    """Why the module cannot be used, and the fix."""
    module, fix = facts["modules"][name], _install(facts, name)
    if module["state"] == "absent":
        return f"{_TITLES[name]} is not installed", fix
    if module["state"] == "broken":
        if name == "cv2":
            fix = "apt-get install libgl1 libglib2.0-0, or pip install opencv-python"
        return f"{_TITLES[name]} is installed but cannot be imported: {module['error']}", fix
    return "", ""


def _need_gpu(facts: dict[str, Any]) -> tuple[str, str]:
    absence = facts["cuda"]["absence"]
    return (f"no GPU: {absence}", facts["cuda"]["fix"]) if absence else ("", "")


def _need_cuda_module(facts: dict[str, Any]) -> tuple[str, str]:
    module = facts["cuda_module"]
    if module["runs_on"]:
        return "", ""
    refused = module["refused"][0] if module["refused"] else None
    return (refused["why"], refused["fix"]) if refused else (module["error"], module["fix"])


def _need_provider(facts: dict[str, Any]) -> tuple[str, str]:
    module, fix = facts["modules"]["onnxruntime"], _install(facts, "onnxruntime")
    if "CUDAExecutionProvider" not in module["providers"]:
        if "gpu" not in fix:
            fix = "use target trt: the package index has no ONNX Runtime with CUDA for this machine"
        return f"this ONNX Runtime has no CUDA provider, only {', '.join(module['providers'])}", fix
    if module["unresolved"]:
        return (
            f"ONNX Runtime's CUDA provider needs {', '.join(module['unresolved'])}",
            "install these CUDA and cuDNN libraries and put their folder in LD_LIBRARY_PATH",
        )
    return "", ""


def _need_tensorrt(facts: dict[str, Any]) -> tuple[str, str]:
    why, fix = _need(facts, "tensorrt")
    version = facts["modules"]["tensorrt"]["version"]
    low, below = _TENSORRT
    if not why and not low <= tuple(map(int, re.findall(r"\d+", version)[:2])) < below:
        why = f"tensorrt {version or 'without a version'} is installed; wanted 10.3 up to 11"
        fix = f"pip uninstall tensorrt; {fix}"
    return why, fix


def _need_rtx_gpu(facts: dict[str, Any]) -> tuple[str, str]:
    have = [gpu["compute_capability"] for gpu in facts["cuda"]["devices"]]
    if set(have) & set(_RTX_CAPABILITIES):
        return "", ""
    return (
        f"TensorRT for RTX runs on compute capability {', '.join(_RTX_CAPABILITIES)}; "
        f"here is {', '.join(have)}",
        "use target trt",
    )


def _install(facts: dict[str, Any], name: str) -> str:
    """The line that installs the module on this kind of machine."""
    if name == "tensorrt" and facts["jetson"]:
        return (
            "apt-get install python3-libnvinfer (JetPack 6 or later); "
            "make virtual environments with --system-site-packages"
        )
    on_pc = facts["python"]["platform"] == "linux-x86_64"
    return {
        "cv2": "pip install opencv-python",
        "onnxruntime": "pip install onnxruntime-gpu" if on_pc else "pip install onnxruntime",
        "tensorrt": "pip install 'tensorrt>=10.3,<12'",
        "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
        "pycuda": "PATH=/usr/local/cuda/bin:$PATH pip install pycuda   (needs the CUDA toolkit)",
    }[name]


def _problems(facts: dict[str, Any]) -> list[dict[str, str]]:
    found: list[tuple[str, str, str]] = []
    package, cuda, modules = facts["package"], facts["cuda"], facts["modules"]
    if package["error"]:
        found.append(("broken", package["error"], package["fix"]))
    for name in _MODULES:
        why, fix = _need_tensorrt(facts) if name == "tensorrt" else _need(facts, name)
        absent = modules[name]["state"] == "absent"
        if why and not (absent and name == "tensorrt_rtx" and facts["jetson"]):  # not for Jetson
            found.append(("missing" if absent else "broken", why, fix))
    if cuda["absence"]:
        found.append(("broken" if cuda["broken"] else "missing", cuda["absence"], cuda["fix"]))
    elif modules["onnxruntime"]["unresolved"]:
        found.append(("missing", *_need_provider(facts)))
    module = facts["cuda_module"]
    if module["broken"] or (module["error"] and cuda["devices"]):  # without a GPU none is needed
        kind = "broken" if module["broken"] else "missing"
        found.append((kind, module["error"], module["fix"]))
    found += [("missing", refused["why"], refused["fix"]) for refused in module["refused"]]
    found += [("clash", *clash) for clash in (*_double_owners(facts), *_differing(facts))]
    if facts["cache"]["error"]:
        fix = "export XDG_CACHE_HOME=/a/folder/you/may/write"
        found.append(("broken", facts["cache"]["error"], fix))
    return [{"kind": kind, "what": what, "fix": fix} for kind, what, fix in found]


def _double_owners(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Import names that several distributions install, one over the other's files."""
    for name, owners in facts["owners"].items():
        if foreign := [owner for owner in owners if owner != _DISTRIBUTION]:
            yield (
                f"the import name {name!r} is also installed by {', '.join(foreign)}",
                f"pip uninstall {' '.join(foreign)}; "
                f"pip install --force-reinstall --no-deps {_DISTRIBUTION}",
            )
    for name in ("cv2", "onnxruntime"):
        owners = sorted(facts["modules"][name]["distributions"])
        if len(owners) > 1:
            yield (
                f"{' and '.join(owners)} are installed over each other as {name!r}",
                f"pip uninstall -y {' '.join(owners)}; {_install(facts, name)}",
            )


def _differing(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Libraries of one name in several versions: an engine of one is refused by the other."""
    for family, name in (("libnvinfer", "tensorrt"), ("libtensorrt_rtx", "tensorrt_rtx")):
        libraries = [lib for lib in facts["libraries"] if lib["family"] == family]
        if len({lib["version"] for lib in libraries if lib["version"]}) > 1:
            listed = ", ".join(f"{lib['version']} in {lib['path']}" for lib in libraries)
            taken = [lib for lib in libraries if name in lib["loaded_by"]]
            python = f"; Python loads {taken[0]['version']}" if taken else ""
            yield (
                f"{_TITLES[name]} is here in several versions: {listed}{python}",
                "remove all but one, or build and run engines with the same one: "
                "python -m runtime build BUNDLE",
            )
        module = facts["modules"][name]
        for library in libraries:
            if name in library["loaded_by"] and not _agree(module["version"], library["version"]):
                yield (
                    f"Python's {name} is {module['version']}, but the library that it loads, "
                    f"{library['path']}, is {library['version']}",
                    "take other TensorRT folders out of LD_LIBRARY_PATH",
                )


def _agree(one: str, other: str | None) -> bool:
    """Whether the versions are equal as far as both go."""
    pairs = zip(one.split("."), (other or one).split("."), strict=False)
    return all(a == b for a, b in pairs)


# Text


def render(report: dict[str, Any]) -> str:
    """What :func:`report` found, for a person: facts, then targets, then problems with fixes."""
    package, python, cuda = report["package"], report["python"], report["cuda"]
    core = package["error"] or f"{package['target']} (of {', '.join(package['targets'])})"
    if package["isa"]:
        core += f", SEG_ISA={package['isa']}"
    rows = [
        (_DISTRIBUTION, f"{package['version'] or 'not installed'}, in {package['folder']}"),
        ("core", core),
        ("Python", f"{python['version']}, {python['platform']}, {python['executable']}"),
        ("NumPy", python["numpy"]),
    ]
    for name, module in report["modules"].items():
        text = {"absent": "not installed", "broken": f"broken: {module['error']}"}
        told = text.get(module["state"], module["version"])
        if module["distributions"]:
            told += f" ({', '.join(f'{n} {v}' for n, v in module['distributions'].items())})"
        if module["providers"]:
            told += f", with {', '.join(module['providers'])}"
        rows.append((_TITLES[name], told))
    rows.append(("CUDA driver", cuda["absence"] or f"CUDA {cuda['driver']}"))
    for gpu in cuda["devices"]:
        memory = f"{gpu['free_bytes'] / 2**30:.1f} of {gpu['memory_bytes'] / 2**30:.1f} GiB free"
        capability = f"compute capability {gpu['compute_capability']}"
        rows.append((f"cuda:{gpu['index']}", f"{gpu['name']}, {capability}, {memory}"))
    rows.append(("CUDA module", _render_cuda_module(report["cuda_module"])))
    for library in report["libraries"]:
        told = f"{library['version'] or 'version unknown'}  {library['path']}"
        told += f"  ({', '.join(library['found_by']) or 'not on a search path'})"
        if library["loaded_by"]:
            told += f"  <- {', '.join(library['loaded_by'])}"
        rows.append((library["family"], told))
    if trtexec := report["trtexec"]:
        linked = trtexec["library"] or "no TensorRT: it opens one when it runs"
        rows.append(("trtexec", f"{trtexec['path']}, links {linked}"))
    if jetson := report["jetson"]:
        rows.append(("Jetson", f"{jetson['model']}, L4T {jetson['l4t']}, {jetson['jetpack']}"))
        locked = {True: "locked", False: "not locked: sudo jetson_clocks", None: "unknown"}
        clocks = locked[jetson["clocks_locked"]]
        rows.append(("power", f"mode {jetson['power_mode'] or 'unknown'}, clocks {clocks}"))
    rows.append(("cache", report["cache"]["error"] or report["cache"]["folder"]))
    lines = [f"{name:18}{told}" for name, told in rows] + ["", "targets"]
    for name, verdict in report["targets"].items():
        lines.append(f"  {name + ':':16}{verdict['why'] or 'ready'}")
        if verdict["fix"]:
            lines.append(f"{'':18}fix: {verdict['fix']}")
    lines += ["", "problems" if report["problems"] else "no problems"]
    for problem in report["problems"]:
        lines.append(f"  {problem['kind']}: {problem['what']}")
        lines.append(f"    fix: {problem['fix']}")
    return "\n".join(lines)


def _render_cuda_module(module: dict[str, Any]) -> str:
    if not module["built"]:
        return f"{module['error']}; device='cuda' needs it: {module['fix']}"
    told = f"for compute capability {', '.join(module['compiled'])}"
    if module["runs_on"] or module["refused"]:
        told += f"; runs on {', '.join(module['runs_on']) or 'no GPU that is here'}"
    return told


# The machine


def _run(command: list[str]) -> tuple[int, str, str]:
    """Exit code and texts of a command; code 127 and no output if it cannot be run."""
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
    """Libraries that a program or library needs, and where the loader finds each, if it does."""
    if os.path.isfile(path):
        _, output, _ = _run(["ldd", str(path)])
        for name, place in re.findall(r"^\s*(\S+) => (not found|\S+)", output, re.MULTILINE):
            yield name, None if place == "not found" else place


def _mapped() -> list[str]:
    """Files that this process has mapped."""
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


def _sentence(error: SdkError) -> str:
    """The error without its fix."""
    return str(error).partition("\n")[0]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
