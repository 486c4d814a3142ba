#!/usr/bin/env bash
# Runs the tests of the C++ core as an aarch64 program under qemu-user, on an x86-64 Debian machine:
#     tests/rules/aarch64.sh tests/core/test_x.py -k name      (any pytest options; paths relative to the repo root)
# Without -k, the script runs the tests that execute each kernel, and leaves out tests of Python code and of the
# reference, which do not depend on the processor.
# Downloads from Debian and PyPI are kept in build/aarch64/: remove that folder to download them again. The core is
# compiled only if its sources or flags have changed. Before the tests, the script prints and checks the number of
# instructions of the convolution. The variable PYTHON names the Python whose pip downloads the wheels and which counts
# the instructions; QEMU_CPU names the emulated processor.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
top=$PWD/build/aarch64 sysroot=$PWD/build/aarch64/sysroot site=$PWD/build/aarch64/site tree=$PWD/build/aarch64/tree
host=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
kernels="not torch and not gate and not larger and not freezes and not reference and not refuses and not public"

# 1. The cross compiler and the emulator, from the system's own packages.
missing=()
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
if ((${#missing[@]})); then
  [ "$(id -u)" = 0 ] || { echo "aarch64.sh: install these packages first: ${missing[*]}" >&2; exit 1; }
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"
fi

# 2. An arm64 system for the tests: Python, its headers and all packages that they depend on, downloaded and unpacked,
# but not installed. apt uses the system's sources and keys, with arm64 as its native architecture and its state in
# build/. ('dpkg --add-architecture' would change the system for every later apt-get.) An empty status file means that
# no package is installed, so apt downloads all dependencies. It needs no root and runs no hooks.
if [ ! -d "$sysroot" ]; then
  new=$top/new && rm -rf "$new" && mkdir -p "$new"/{state/lists,cache/archives}/partial "$new"/root/usr/{bin,sbin,lib}
  touch "$new/status" && ln -s usr/{bin,sbin,lib} "$new/root/" # merged /usr: packages use both paths
  printf '%s;\n' 'APT::Architecture "arm64"' 'APT::Architectures { "arm64"; }' 'APT::Sandbox::User ""' \
    '#clear APT::Update' '#clear DPkg' "Dir::Log \"$new\"" "Dir::Cache \"$new/cache\"" "Dir::State \"$new/state\"" \
    "Dir::State::status \"$new/status\"" >"$new/apt.conf"
  APT_CONFIG=$new/apt.conf apt-get update -qq
  APT_CONFIG=$new/apt.conf apt-get install -qq -y --download-only --no-install-recommends \
    python3 libpython3-dev libstdc++6
  for deb in "$new"/cache/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C "$new/root"
  done
  # The Python packages, as aarch64 wheels for the Python just unpacked; pybind11 for its headers.
  version=$(readlink "$new/root/usr/bin/python3") && rm -rf "$site"
  "$host" -m pip install -q --target "$site" \
    --only-binary=:all: --implementation cp --python-version "${version#python}" --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 numpy pytest hypothesis pybind11
  mv "$new/root" "$sysroot" && rm -rf "$new" # at the end, so that an interrupted run starts again
fi
python=$(readlink "$sysroot/usr/bin/python3") # python3.11 on Debian 12

# 3. The core: the flags of setup.py, then those that setuptools and pybind11 add. The sysroot's /usr/include is the last
# folder of headers: only Python's pyconfig.h is read from it, and the C library's headers are the compiler's own.
flags=(-O3 -std=c++17 -pthread -ffp-contract=fast -fno-math-errno -Wall -Wextra -Wno-psabi ${SEG_WERROR:+-Werror}
  -DNDEBUG -fwrapv -fPIC -fvisibility=hidden
  -isystem "$site/pybind11/include" -isystem "$sysroot/usr/include/$python" -idirafter "$sysroot/usr/include")
key=$({ echo "${flags[@]}" && find runtime/csrc -type f -print0 | sort -z | xargs -0 sha256sum; } | sha256sum)
if [ "$key" != "$(cat "$top/obj/key" 2>/dev/null)" ]; then
  rm -rf "$top/obj" && mkdir -p "$top"/obj/runtime/csrc/{cpu,python}
  printf '%s\n' runtime/csrc/python/{core,kernels}.cpp runtime/csrc/cpu/*.cpp |
    xargs -P "$(nproc)" -I{} aarch64-linux-gnu-g++ "${flags[@]}" -c {} -o "$top/obj/{}.o"
  aarch64-linux-gnu-g++ -shared -pthread "$top"/obj/runtime/csrc/{cpu,python}/*.o -o "$top/obj/_core.so"
  echo "$key" >"$top/obj/key"
fi
"$host" tests/rules/neon_counts.py # the instructions of its convolution

# 4. A copy of the files that the tests import, with this core, because the work tree contains the x86 one.
rm -rf "$tree" && mkdir "$tree"
tar -c --exclude='*.so' --exclude=__pycache__ --exclude=runtime/csrc pyproject.toml runtime tests | tar -x -C "$tree"
cp "$top/obj/_core.so" "$tree/runtime/_core.cpython-${python//[!0-9]/}-aarch64-linux-gnu.so"

# 5. The tests. Python is started by a wrapper that is also its sys.executable, so that a test can start another Python.
# The emulated processor is an Armv8.0 one, as on small boards: the run stops at an instruction that such a board lacks.
# It has no SVE, because under emulation NumPy's matrix product with SVE is slow and reports false overflows.
printf '#!/bin/sh\nexec qemu-aarch64 -0 "$0" "${0%%/*}/%s" "$@"\n' "$python" >"$sysroot/usr/bin/python-in-qemu"
chmod +x "$sysroot/usr/bin/python-in-qemu"
unset PYTHONHOME LD_PRELOAD LD_LIBRARY_PATH
export QEMU_LD_PREFIX=$sysroot QEMU_CPU=${QEMU_CPU:-cortex-a72} PYTHONPATH=$tree:$site PYTHONNOUSERSITE=1
cd "$tree"
exec "$sysroot/usr/bin/python-in-qemu" -c 'import platform, sys, pytest, runtime._core as core
print("aarch64.sh:", platform.machine(), core.__file__, flush=True)
sys.exit(pytest.main(sys.argv[1:]))' -p no:cacheprovider -k "$kernels" "$@" # a later -k replaces the first
