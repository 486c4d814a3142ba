#!/usr/bin/env bash
# Builds the core with sanitizers and runs tests with that core:
#     tests/rules/sanitize.sh address,undefined tests/core/test_conv.py ...
# Other options of pytest are allowed. Without -k, the script runs the tests that execute each kernel on all of its
# shapes, and leaves out tests that a sanitizer learns nothing from: tests of Python code and of the reference, long
# runs that repeat the same kernels, and comparisons with PyTorch.
# The variable PYTHON names the Python to use. The build is kept in build/sanitize/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
kind=$1 && shift
python=${PYTHON:-$PWD/.venv/bin/python}
kernels="not torch and not gate and not larger and not freezes and not reference and not refuses and not public"
kernels+=" and not stops and not stop_needs and not silhouette and not min_labels and not memory and not majority"
top=$PWD/build/sanitize/${kind//,/-}
mkdir -p "$top"

SEG_SANITIZE=$kind "$python" setup.py -q build_ext --build-lib "$top/lib" --build-temp "$top/obj" >/dev/null

# The tests run in a copy of the files that they import, with this core: they cannot import the ordinary core.
rm -rf "$top/tree" && mkdir "$top/tree"
tar -c --exclude='*.so' --exclude=__pycache__ --exclude=runtime/csrc/cpu pyproject.toml runtime sdk tests | tar -x -C "$top/tree"
cp "$top"/lib/runtime/_core*.so "$top/tree/runtime/"

# Python itself is not instrumented, so the sanitizer's library is loaded before it. Leaks are not checked, because
# Python frees little memory when it ends.
compiler=${CXX:-g++}
library=$([ "$kind" = thread ] && echo libtsan.so || echo libasan.so)
cd "$top/tree"
export LD_PRELOAD="$($compiler -print-file-name=$library) $($compiler -print-file-name=libstdc++.so)"
# OpenCV's thread pool is not instrumented, so reports about it are wrong.
printf 'race:cv2\n' >"$top/suppressions"
TSAN_OPTIONS="suppressions=$top/suppressions ${TSAN_OPTIONS:-}"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS="halt_on_error=1 ${TSAN_OPTIONS:-}"
exec "$python" -c 'import sys, pytest, runtime._core as core
print("sanitize.sh:", core.__file__, flush=True)
sys.exit(pytest.main(sys.argv[1:]))' -p no:cacheprovider -k "$kernels" "$@" # a later -k replaces the first
