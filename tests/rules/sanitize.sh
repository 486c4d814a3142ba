#!/usr/bin/env bash
# Builds the core with sanitizers and runs tests with it:
#     tests/rules/sanitize.sh address,undefined tests/core/test_conv.py ...
# PYTHON names the Python to use. What it builds stays in build/sanitize/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
kind=$1 && shift
python=${PYTHON:-$PWD/.venv/bin/python}
top=$PWD/build/sanitize/${kind//,/-}
mkdir -p "$top"

SEG_SANITIZE=$kind "$python" setup.py -q build_ext --build-lib "$top/lib" --build-temp "$top/obj" >/dev/null

# A copy of what the tests import, with this core, so that the ordinary one cannot be taken.
rm -rf "$top/tree" && mkdir "$top/tree"
tar -c --exclude='*.so' --exclude=__pycache__ --exclude=runtime/csrc/cpu pyproject.toml runtime sdk tests | tar -x -C "$top/tree"
cp "$top"/lib/runtime/_core*.so "$top/tree/runtime/"

# Python itself is not instrumented, so the sanitizer's library is loaded first; Python frees little
# at its end, so leaks are not looked for.
compiler=${CXX:-g++}
library=$([ "$kind" = thread ] && echo libtsan.so || echo libasan.so)
cd "$top/tree"
export LD_PRELOAD="$($compiler -print-file-name=$library) $($compiler -print-file-name=libstdc++.so)"
# OpenCV's own thread pool is not instrumented: its races are not ours to judge.
printf 'race:cv2\n' >"$top/suppressions"
TSAN_OPTIONS="suppressions=$top/suppressions ${TSAN_OPTIONS:-}"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS="halt_on_error=1 ${TSAN_OPTIONS:-}"
exec "$python" -c 'import sys, pytest, runtime._core as core
print("sanitize.sh:", core.__file__, flush=True)
sys.exit(pytest.main(sys.argv[1:]))' -p no:cacheprovider "$@"
