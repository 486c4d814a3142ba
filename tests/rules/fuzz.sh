#!/usr/bin/env bash
# Builds the fuzz targets in tests/fuzz with Clang's libFuzzer and its sanitizers, and runs each on a number of inputs,
# which are made from seeds. A finding fails the script, and its input is kept in build/fuzz/:
#     tests/rules/fuzz.sh [INPUTS [SEED]]       (5000 inputs and the seed 1 without arguments)
# The variable PYTHON names the Python that makes the seeds; without it that of .venv, which "make test" creates.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
inputs=${1:-5000} seed=${2:-1} top=$PWD/build/fuzz python=${PYTHON:-$PWD/.venv/bin/python}

command -v "$python" >/dev/null || {
  echo "fuzz.sh: $python is missing; run \"make test\" first, or set PYTHON to a Python with NumPy and OpenCV" >&2
  exit 1
}

# Clang and the library of its sanitizers, which is a package of its own on Debian.
works() { echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }' |
  clang++ -fsanitize=fuzzer,address,undefined -x c++ - -o /dev/null 2>/dev/null; }
install() { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"; }
if ! works && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  command -v clang++ >/dev/null || install clang >/dev/null
  version=$(clang++ -dumpversion)
  works || install "libclang-rt-${version%%.*}-dev" >/dev/null
fi
works || { echo "fuzz.sh: install Clang with libFuzzer first (Debian: clang, libclang-rt-VERSION-dev)" >&2; exit 1; }

mkdir -p "$top"
flags=(-std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all)
clang++ "${flags[@]}" tests/fuzz/jpeg.cpp runtime/csrc/cpu/jpeg*.cpp -o "$top/jpeg"
rm -rf "$top/jpeg-seeds" "$top/jpeg-inputs" && mkdir "$top/jpeg-inputs"
"$python" tests/fuzz/jpeg_seeds.py "$top/jpeg-seeds"
# libFuzzer writes inputs that reach new code into the first folder.
"$top/jpeg" -runs="$inputs" -seed="$seed" -max_len=4096 -timeout=10 -verbosity=0 -print_final_stats=1 \
  -artifact_prefix="$top/jpeg-finding-" "$top/jpeg-inputs" "$top/jpeg-seeds"
