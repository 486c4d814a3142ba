"""python -m runtime doctor: what this machine can run and build, its problems, and their fixes.

:func:`report` collects facts and judges them. It raises no exception.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from runtime.device import choose, driver
from runtime.engines import tensorrt
from runtime.flavours import LIBRARIES, repair, too_old
from runtime.tools import probe
from runtime.tools.probe import DISTRIBUTION, MODULES, OURS

_TITLES = {
    "cv2": "OpenCV",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT for RTX",
    "pycuda": "PyCUDA",
}


def report() -> dict[str, Any]:
    """Collect facts about this machine and judge them.

    Returns
    -------
    A dict of the types of JSON, with these keys:

    package, python, modules, cuda, cuda_module, libraries, trtexec, jetson, owners, cache : the
        facts. ``package["isas"]`` lists the instruction sets that the core can use on this CPU,
        ``package["isa"]`` is the one in use, ``package["SEG_ISA"]`` the environment variable.
    targets : name -> {"ready": bool, "why": str, "fix": str}: what this machine can run and build.
    problems : [{"kind", "what", "fix"}]. Kind is "missing" (not installed; perhaps not needed),
        "clash" (installed twice, too old, or in versions that differ) or "broken" (installed but
        failing).
    """
    owners = probe.owners_of_modules()
    cuda = probe.cuda_facts()
    modules = probe.module_facts(owners, with_driver=not cuda["absence"])
    trtexec = probe.trtexec_facts()
    facts = {
        "package": probe.package_facts(owners),
        "python": {
            "version": sys.version.split()[0],
            "executable": sys.executable,
            "platform": driver.platform_tag(),
            "numpy": np.__version__,
        },
        "processors": {
            "usable": choose.processors(),
            "limit": choose.cpu_limit(),
            "threads": choose.default_threads(),
        },
        "modules": modules,
        "cuda": cuda,
        "cuda_module": probe.cuda_module_facts(cuda),
        "libraries": probe.library_facts(modules, trtexec),
        "trtexec": trtexec,
        "jetson": probe.jetson(),
        "owners": {name: sorted(owners.get(name, {})) for name in OURS},
        "cache": probe.cache_facts(),
    }
    return facts | {"targets": _targets(facts), "problems": _problems(facts)}


def _targets(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Judge each target: the first of its needs that is not met says why it is not ready."""
    onnx, gpu = _need(facts, "onnxruntime"), _need_gpu(facts)
    rtx, pycuda = _need(facts, "tensorrt_rtx"), _need(facts, "pycuda")
    rtx_start, trt_start = _need_start(facts, "tensorrt_rtx"), _need_start(facts, "tensorrt")
    core = (facts["package"]["error"], facts["package"]["fix"])
    needs = {
        "cpu": [core, _need(facts, "cv2")],
        "cuda": [core, _need(facts, "cv2"), gpu, _need_cuda_module(facts)],
        "onnx": [onnx],
        "onnx on cuda": [onnx, gpu, _need_provider(facts)],
        "rtx build": [rtx, rtx_start],
        "rtx run": [rtx, gpu, rtx_start, _need_rtx_gpu(facts), pycuda],
        "trt": [_need_tensorrt(facts), gpu, trt_start, pycuda],
    }
    verdicts = {}
    for name, unmet in needs.items():
        why, fix = next(((w, f) for w, f in unmet if w), ("", ""))
        verdicts[name] = {"ready": not why, "why": why, "fix": fix}
    return verdicts


def _need(facts: dict[str, Any], name: str) -> tuple[str, str]:
    """Return why a Python module cannot be used, and the fix; ("", "") if it can."""
    module, fix = facts["modules"][name], _install(facts, name)
    if module["state"] == "absent":
        return f"{_TITLES[name]} is not installed", fix
    if module["state"] == "broken":
        if name in LIBRARIES:
            fix = repair(name, module["error"])
        return f"{_TITLES[name]} is installed but cannot be imported: {module['error']}", fix
    return "", ""


def _need_start(facts: dict[str, Any], name: str) -> tuple[str, str]:
    """Return why TensorRT does not start, and the fix; ("", "") if it starts or is not there."""
    module = facts["modules"][name]
    if module["state"] != "unstarted":
        return "", ""
    fix = module.get("fix") or "run python -m runtime doctor again; update NVIDIA's driver"
    return f"{_TITLES[name]} is installed but does not start: {module['error']}", fix


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
        return f"ONNX Runtime has no CUDA provider, only {', '.join(module['providers'])}", fix
    if module["unresolved"]:
        return (
            f"ONNX Runtime's CUDA provider needs {', '.join(module['unresolved'])}",
            "install these CUDA and cuDNN libraries and put their folder in LD_LIBRARY_PATH",
        )
    return "", ""


def _need_tensorrt(facts: dict[str, Any]) -> tuple[str, str]:
    why, fix = _need(facts, "tensorrt")
    version = facts["modules"]["tensorrt"]["version"]
    if not why and not tensorrt.is_known(version):
        why = f"tensorrt {version or 'without a version'} is installed; wanted 10.3 up to 11"
        fix = f"pip uninstall tensorrt; {fix}"
    return why, fix


def _need_rtx_gpu(facts: dict[str, Any]) -> tuple[str, str]:
    have = [gpu["compute_capability"] for gpu in facts["cuda"]["devices"]]
    if set(have) & set(tensorrt.RTX_CAPABILITIES):
        return "", ""
    return (
        f"TensorRT for RTX runs on compute capability {', '.join(tensorrt.RTX_CAPABILITIES)}; "
        f"this machine has {', '.join(have)}",
        "use target trt",
    )


def _install(facts: dict[str, Any], name: str) -> str:
    """Return the command that installs a module on this kind of machine."""
    if name == "tensorrt" and facts["jetson"]:
        return (
            "apt-get install python3-libnvinfer (JetPack 6 or later); "
            "make virtual environments with --system-site-packages"
        )
    on_pc = facts["python"]["platform"] == "linux-x86_64"
    return {
        "cv2": "pip install opencv-python   (without windows: opencv-python-headless)",
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
    for name in MODULES:
        why, fix = _need_tensorrt(facts) if name == "tensorrt" else _need(facts, name)
        # Without a GPU nothing is wrong with a TensorRT that does not start; the GPU is missing.
        if not why and not (name == "tensorrt" and cuda["absence"]):
            why, fix = _need_start(facts, name)
        absent = modules[name]["state"] == "absent"
        # TensorRT for RTX does not support Jetson, so its absence is no problem there.
        if why and not (absent and name == "tensorrt_rtx" and facts["jetson"]):
            found.append(("missing" if absent else "broken", why, fix))
    if cuda["absence"]:
        found.append(("broken" if cuda["broken"] else "missing", cuda["absence"], cuda["fix"]))
    elif modules["onnxruntime"]["unresolved"]:
        found.append(("missing", *_need_provider(facts)))
    module = facts["cuda_module"]
    # A machine without a GPU does not need the CUDA module.
    if module["broken"] or (module["error"] and cuda["devices"]):
        kind = "broken" if module["broken"] else "missing"
        found.append((kind, module["error"], module["fix"]))
    found += [("missing", refused["why"], refused["fix"]) for refused in module["refused"]]
    clashes = (*_flavours(facts), *_double_owners(facts), *_differing(facts))
    found += [("clash", *clash) for clash in clashes]
    if facts["cache"]["error"]:
        fix = "export XDG_CACHE_HOME=/a/folder/you/may/write"
        found.append(("broken", facts["cache"]["error"], fix))
    return [{"kind": kind, "what": what, "fix": fix} for kind, what, fix in found]


def _flavours(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Find an OpenCV or ONNX Runtime that is too old, and a Jetson's OpenCV without GStreamer."""
    for name, library in LIBRARIES.items():
        module = facts["modules"][name]
        if why := too_old(name, module["version"]):
            flavour = next(iter(module["distributions"]), library.flavours[0])
            yield why, f"pip install '{flavour}>={library.lowest}'"
    opencv = facts["modules"]["cv2"]
    if facts["jetson"] and "no GStreamer" in opencv["features"]:
        own = " ".join(opencv["distributions"])
        yield (
            "this OpenCV has no GStreamer, which cameras of a Jetson need; JetPack's OpenCV has it",
            (f"pip uninstall -y {own}; " if own else "") + "apt-get install libopencv-python; "
            "make virtual environments with --system-site-packages",
        )


def _double_owners(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Find import names that several distributions install, each over the files of the others."""
    for name, owners in facts["owners"].items():
        if foreign := [owner for owner in owners if owner != DISTRIBUTION]:
            yield (
                f"the import name {name!r} is also installed by {', '.join(foreign)}",
                f"pip uninstall {' '.join(foreign)}; "
                f"pip install --force-reinstall --no-deps {DISTRIBUTION}",
            )
    for name in LIBRARIES:
        owners = sorted(facts["modules"][name]["distributions"])
        if len(owners) > 1:
            yield (
                f"{' and '.join(owners)} are installed over each other as {name!r}",
                f"pip uninstall -y {' '.join(owners)}; {_install(facts, name)}",
            )


def _differing(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Find libraries that this machine has in several versions: an engine of one version cannot be
    loaded by another."""
    for family, name in (("libnvinfer", "tensorrt"), ("libtensorrt_rtx", "tensorrt_rtx")):
        libraries = [lib for lib in facts["libraries"] if lib["family"] == family]
        if len({lib["version"] for lib in libraries if lib["version"]}) > 1:
            listed = ", ".join(f"{lib['version']} in {lib['path']}" for lib in libraries)
            loaded = [lib for lib in libraries if name in lib["loaded_by"]]
            python = f"; Python loads {loaded[0]['version']}" if loaded else ""
            yield (
                f"{_TITLES[name]} is installed in several versions: {listed}{python}",
                "remove all but one, or build and run engines with the same one: "
                "python -m runtime build BUNDLE",
            )
        module = facts["modules"][name]
        for library in libraries:
            if name in library["loaded_by"] and not _agree(module["version"], library["version"]):
                yield (
                    f"Python's {name} is {module['version']}, but the library that it loads, "
                    f"{library['path']}, is {library['version']}",
                    "remove other TensorRT folders from LD_LIBRARY_PATH",
                )


def _agree(one: str, other: str | None) -> bool:
    """Whether two versions are equal in the parts that both have: 10.3 and 10.3.0 agree."""
    pairs = zip(one.split("."), (other or one).split("."), strict=False)
    return all(a == b for a, b in pairs)


def render(report: dict[str, Any]) -> str:
    """Return a report as text: first facts, then targets, then problems with their fixes.

    Parameters
    ----------
    report : what :func:`report` returns.
    """
    package, python, cuda = report["package"], report["python"], report["cuda"]
    core = package["error"] or f"isa {package['isa']} (of {', '.join(package['isas'])})"
    if package["SEG_ISA"]:
        core += f", SEG_ISA={package['SEG_ISA']}"
    rows = [
        (DISTRIBUTION, f"{package['version'] or 'not installed'}, in {package['folder']}"),
        ("core", core),
        ("Python", f"{python['version']}, {python['platform']}, {python['executable']}"),
        ("NumPy", python["numpy"]),
        ("processors", _render_processors(report["processors"])),
    ]
    for name, module in report["modules"].items():
        text = {"absent": "not installed", "broken": f"broken: {module['error']}"}
        cell = text.get(module["state"], module["version"])
        if module["state"] == "unstarted":
            cell += ", does not start here"
        if module["distributions"]:
            cell += f" ({', '.join(f'{n} {v}' for n, v in module['distributions'].items())})"
        elif module["state"] == "ready" and module["file"]:
            cell += f" (of no pip package: {module['file']})"
        if module["providers"]:
            cell += f", with {', '.join(module['providers'])}"
        if name == "cv2" and module["features"]:
            cell += f", {module['features']}"
        rows.append((_TITLES[name], cell))
    rows.append(("CUDA driver", cuda["absence"] or f"CUDA {cuda['driver']}"))
    for gpu in cuda["devices"]:
        memory = f"{gpu['free_bytes'] / 2**30:.1f} of {gpu['memory_bytes'] / 2**30:.1f} GiB free"
        capability = f"compute capability {gpu['compute_capability']}"
        rows.append((f"cuda:{gpu['index']}", f"{gpu['name']}, {capability}, {memory}"))
    rows.append(("CUDA module", _render_cuda_module(report["cuda_module"])))
    for library in report["libraries"]:
        cell = f"{library['version'] or 'version unknown'}  {library['path']}"
        cell += f"  ({', '.join(library['found_by']) or 'not on a search path'})"
        if library["loaded_by"]:
            cell += f"  <- {', '.join(library['loaded_by'])}"
        rows.append((library["family"], cell))
    if trtexec := report["trtexec"]:
        linked = trtexec["library"] or "no TensorRT; it loads one when it runs"
        rows.append(("trtexec", f"{trtexec['path']}, links {linked}"))
    if jetson := report["jetson"]:
        rows.append(("Jetson", f"{jetson['model']}, L4T {jetson['l4t']}, {jetson['jetpack']}"))
        locked = {True: "locked", False: "not locked: sudo jetson_clocks", None: "unknown"}
        clocks = locked[jetson["clocks_locked"]]
        rows.append(("power", f"mode {jetson['power_mode'] or 'unknown'}, clocks {clocks}"))
    rows.append(("cache", report["cache"]["error"] or report["cache"]["folder"]))
    lines = [f"{name:18}{cell}" for name, cell in rows] + ["", "targets"]
    for name, verdict in report["targets"].items():
        lines.append(f"  {name + ':':16}{verdict['why'] or 'ready'}")
        if verdict["fix"]:
            lines.append(f"{'':18}fix: {verdict['fix']}")
    lines += ["", "problems" if report["problems"] else "no problems"]
    for problem in report["problems"]:
        lines.append(f"  {problem['kind']}: {problem['what']}")
        lines.append(f"    fix: {problem['fix']}")
    return "\n".join(lines)


def _render_processors(processors: dict[str, Any]) -> str:
    cell = f"{processors['usable']}, threads by default: {processors['threads']}"
    if processors["limit"] is not None:
        cell += f" (the control group of this process allows {processors['limit']:g} processors)"
    return cell


def _render_cuda_module(module: dict[str, Any]) -> str:
    if not module["built"]:
        return f"{module['error']}; device='cuda' needs it: {module['fix']}"
    cell = f"for compute capability {', '.join(module['compiled'])}"
    if module["runs_on"] or module["refused"]:
        cell += f"; runs on {', '.join(module['runs_on']) or 'no GPU of this machine'}"
    return cell
