#!/usr/bin/env bash
# Checks and measures the CUDA module on a machine with a GPU, nvcc, PyTorch and this source tree:
#     benchmarks/speed/gpu_check.sh FOLDER
# The script installs nothing and needs no network. It lists what is missing, builds in place for
# this GPU only, and runs the device tests, the benchmarks against PyTorch, and compute-sanitizer
# over all kernels at small sizes. If a phase fails, the next ones run all the same. Each phase has
# a time limit; all together need less than eight minutes. FOLDER/gpu_check.json, written after each
# phase, contains results, logs and samples. The exit code is 1 if a phase failed. The variable
# PYTHON names the Python to use (python3).
# shellcheck disable=SC2317 # phase calls the functions by their names
set -uo pipefail
case "${1-}" in '' | -*) set -- ;; esac
[ $# -eq 1 ] || { echo "usage: benchmarks/speed/gpu_check.sh FOLDER" >&2 && exit 2; }
unset CDPATH
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
if [ -d "$out/gpu_check.json" ] || ! touch "$out/gpu_check.json"; then
  echo "gpu_check: $out/gpu_check.json cannot be written; name another folder" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 work
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "gpu_check: no Python 3.10 or newer; PYTHON=/path/to/python names another" >&2
  printf '{"complete": true, "ok": false, "phases": [], "why": "no Python"}\n' >"$out/gpu_check.json"
  exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
readonly MOST=465 SKIPPED=77 # seconds of all phases together; exit code of a skipped phase

# ---- The JSON file ------------------------------------------------------------------------------

cat >"$work/record.py" <<'PYTHON'
import datetime, json, os, pathlib, subprocess, sys

out, work, complete = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "complete"


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


def read(name):
    path = work / name
    return json.loads(path.read_text()) if path.exists() else None


phases = []
for line in (work / "phases").read_text().splitlines():
    name, result, code, seconds, limit = line.split("\t")
    log = (work / f"{name}.log").read_text(errors="replace")
    phases.append({"name": name, "result": result, "exit_code": int(code), "seconds": int(seconds),
                   "limit": int(limit), "log": log[-60000:]})
document = {
    "command": "benchmarks/speed/gpu_check.sh " + str(out),
    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "commit": output("git", "describe", "--always", "--dirty") or "unknown",
    "machine": {"system": " ".join(os.uname()), "processors": os.cpu_count(),
                "nvidia-smi": output("nvidia-smi")},
    "complete": complete,
    "ok": complete and all(phase["result"] in ("ok", "skipped") for phase in phases),
    "phases": phases,
    "benchmarks": read("gpu.json"),
    "compiled": read("gpu-compiled.json"),
}
half = out / "gpu_check.half"
half.write_text(json.dumps(document, indent=1) + "\n")
os.replace(half, out / "gpu_check.json")
PYTHON

record() { "$PYTHON" "$work/record.py" "$out" "$work" "$1"; }

# phase NAME SECONDS FUNCTION [ARGUMENT]...
results=() ok=1
phase() {
  local name=$1 limit=$2 begin=$SECONDS code=0 lines=30 result
  shift 2
  ((limit > MOST - SECONDS)) && limit=$((MOST - SECONDS))
  echo "== $name (at most $limit s)"
  if ((limit < 5)); then
    echo "no time is left for this phase" >"$work/$name.log"
    code=124
  else
    timeout -k 5 "$limit" bash -c '"$@"' _ "$@" >"$work/$name.log" 2>&1 </dev/null || code=$?
  fi
  case $code in
    0) result=ok ;;
    "$SKIPPED") result=skipped ;;
    124 | 137) result="out of time" ;;
    *) result=failed ;;
  esac
  [[ $result == ok || $result == skipped ]] || ok=0
  [[ $name == benchmarks || $name == compiled ]] && lines=120
  printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$result" "$code" $((SECONDS - begin)) "$limit" >>"$work/phases"
  tail -n "$lines" "$work/$name.log" | cut -c 1-220 | sed 's/^/   /'
  results+=("$name: $result, $((SECONDS - begin)) s")
  echo "   -- $result, $((SECONDS - begin)) s"
  record going
}

# ---- Phases -------------------------------------------------------------------------------------

cat >"$work/requirements.py" <<'PYTHON'
import importlib, os, pathlib, shutil, subprocess, sys, sysconfig

missing = []


def need(what, found, fix=""):
    print(f"{what}: {found or 'MISSING'}")
    if not found:
        missing.append(f"{what} ({fix})")


def module(name):
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"  {name}: {error}")
        return None


def version(name):
    found = module(name)
    return found and getattr(found, "__version__", "version unknown")


def first_line(*command):
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


print("Python:", sys.executable, sys.version.split()[0])
for name in ("numpy", "scipy", "pytest"):
    need(name, version(name), f"pip install {name}")
setuptools = version("setuptools") or "0"
new = int(setuptools.split(".")[0]) >= 77
need("setuptools 77", setuptools if new else "", f"found {setuptools}; pip install -U setuptools")
torch = module("torch")
need("PyTorch", torch and torch.__version__, "pip install torch")
if torch is not None:
    name = torch.cuda.is_available() and torch.cuda.get_device_name()
    need("PyTorch's GPU", name, f"PyTorch is built for CUDA {torch.version.cuda}; run nvidia-smi")
headers = torch and pathlib.Path(torch.__file__).parent / "include/pybind11/pybind11.h"
bundled = headers and headers.exists() and "PyTorch's headers"
need("pybind11", version("pybind11") or bundled, "pip install pybind11")
python_h = pathlib.Path(sysconfig.get_paths()["include"], "Python.h")
need("Python.h", python_h.exists() and str(python_h), "Debian: apt-get install python3-dev")
need("C++ compiler", first_line(os.environ.get("CXX", "c++"), "-dumpfullversion"), "g++")
homes = [f"{os.environ[n]}/bin" for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
places = [*homes, os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
need("nvcc", nvcc and first_line(nvcc, "--version"), "install the CUDA toolkit, or set CUDA_HOME")
sys.path.insert(0, os.getcwd())
driver = module("runtime.device.driver")
if driver is not None:
    gpus = [f"{g.name}, {g.compute_capability}" for g in driver.cuda_devices()]
    need("GPU", "; ".join(gpus), driver.cuda_absence())
for name in ("triton", "onnxruntime", "pynvml", "cv2"):  # optional
    print(f"{name}: {version(name) or 'not installed, and not needed'}")
if missing:
    sys.exit("missing: " + "; ".join(missing))
PYTHON

requirements() { "$PYTHON" "$work/requirements.py"; }

# Checks that the CUDA module can run, or fails with the reason.
can_run() {
  "$PYTHON" - <<'PYTHON'
import sys

from runtime.device.choose import module_of
from runtime.errors import SdkError

try:
    print("runtime._cuda is built for", *module_of("cuda").architectures())
except SdkError as error:
    sys.exit(f"the GPU cannot be used: {error}")
PYTHON
}

# setup.py needs pybind11's headers, which PyTorch contains, and its build helpers, which it lacks.
# This function writes a package with the helpers that setup.py uses.
stand_in() {
  mkdir -p "$work/stand_in/pybind11"
  cat >"$work/stand_in/pybind11/__init__.py" <<'PYTHON'
from pathlib import Path

import torch


def get_include():
    return str(Path(torch.__file__).parent / "include")
PYTHON
  cat >"$work/stand_in/pybind11/setup_helpers.py" <<'PYTHON'
from multiprocessing.pool import ThreadPool

import pybind11
from setuptools import Extension
from setuptools.command.build_ext import build_ext  # noqa: F401
from distutils.ccompiler import CCompiler  # part of setuptools


class Pybind11Extension(Extension):
    def __init__(self, *args, **options):
        super().__init__(*args, **(options | {"language": "c++"}))
        self.include_dirs.append(pybind11.get_include())
        self.extra_compile_args.append("-fvisibility=hidden")


class ParallelCompile:
    def __init__(self, variable, default):
        self.count = default

    def install(self):
        count = self.count

        def compile(self, sources, output_dir=None, macros=None, include_dirs=None, debug=False,
                    extra_preargs=None, extra_postargs=None, depends=None):
            macros, objects, postargs, options, build = self._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            arguments = self._get_cc_args(options, debug, extra_preargs)
            with ThreadPool(count) as pool:
                pool.map(lambda o: self._compile(o, *build[o], arguments, postargs, options),
                         [o for o in objects if o in build], 1)
            return objects

        CCompiler.compile = compile
PYTHON
  export PYTHONPATH=$work/stand_in${PYTHONPATH:+:$PYTHONPATH}
}

build() {
  local capability
  capability=$("$PYTHON" - <<'PYTHON'
import sys

from runtime.device.driver import cuda_absence, cuda_devices

gpus = cuda_devices()
if not gpus:
    sys.exit(f"no GPU to build for: {cuda_absence()}")
print(gpus[0].compute_capability.replace(".", ""))
PYTHON
  ) || return 1
  "$PYTHON" -c 'import pybind11.setup_helpers' 2>/dev/null || stand_in
  echo "building for compute capability $capability"
  SEG_CUDA_ARCHS=$capability SEG_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace --force || return 1
  can_run
}

device_tests() {
  can_run && "$PYTHON" -m pytest tests/cuda/test_gpu.py "$@" --tb=short -p no:cacheprovider
}

sanitizer() {
  local tool home nvcc
  nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
  for home in "${CUDA_HOME:-/usr/local/cuda}" "$(dirname "$(readlink -f "$nvcc")")/.."; do
    PATH=$PATH:$home/bin:$home/compute-sanitizer
  done
  tool=$(command -v compute-sanitizer) || { echo "compute-sanitizer is not installed" && return "$SKIPPED"; }
  can_run || return 1
  "$tool" --tool "$1" --error-exitcode 9 --target-processes all --print-limit 20 "$PYTHON" \
    -m pytest tests/cuda/test_gpu.py -k "every_kernel and not host" --tb=short -p no:cacheprovider
}

bench() { "$PYTHON" -m benchmarks gpu -o "$work" "$@"; }

compiled() {
  "$PYTHON" -c 'import triton' || { echo "torch.compile needs triton" && return "$SKIPPED"; }
  bench --compiled
}

export SKIPPED
export -f requirements can_run stand_in build device_tests sanitizer bench compiled

phase requirements 30 requirements
phase build 100 build
phase tests 100 device_tests -k "not host" --durations=5
phase benchmarks 90 bench
phase memcheck 55 sanitizer memcheck
phase racecheck 55 sanitizer racecheck
phase initcheck 30 sanitizer initcheck
phase compiled 300 compiled # phase shortens the limit to the time that is left
record complete

printf '%s\n' "${results[@]}" "$SECONDS s in all; $out/gpu_check.json"
exit $((1 - ok))
