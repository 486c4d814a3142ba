#!/usr/bin/env bash
# Runs the tests of the C++ core as an aarch64 program under qemu-user, on an x86-64 Debian machine:
#     tests/rules/aarch64.sh tests/core/test_x.py -k name      (any pytest options; paths relative to the repo root)
# What it fetches from Debian and PyPI stays in build/aarch64/: remove that folder to start afresh. The core is
# compiled again only when its sources or flags have changed. Before the tests it prints and checks how many
# instructions the convolution takes. PYTHON names the Python whose pip fetches the wheels and which counts, QEMU_CPU
# the processor that is emulated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
top=$PWD/build/aarch64 sysroot=$PWD/build/aarch64/sysroot site=$PWD/build/aarch64/site tree=$PWD/build/aarch64/tree
host=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

# 1. The cross compiler and the emulator, from the system's own packages.
missing=()
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
if ((${#missing[@]})); then
  [ "$(id -u)" = 0 ] || { echo "aarch64.sh: install these packages first: ${missing[*]}" >&2; exit 1; }
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"
fi

# 2. An arm64 system to run in: Python, its headers and all they depend on, fetched and unpacked, not installed.
# apt reads the system's sources and keys, but with arm64 as its native architecture and its state in build/, where
# 'dpkg --add-architecture' would change the system for every later apt-get. Its empty status file says that nothing
# is installed, so it fetches the whole closure. It drops to no other user and runs no hooks, and needs no root.
if [ ! -d "$sysroot" ]; then
  new=$top/new && rm -rf "$new" && mkdir -p "$new"/{state/lists,cache/archives}/partial "$new"/root/usr/{bin,sbin,lib}
  touch "$new/status" && ln -s usr/{bin,sbin,lib} "$new/root/" # merged /usr, whichever way a package has it
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
  mv "$new/root" "$sysroot" && rm -rf "$new" # last, so that a run cut short starts over
fi
python=$(readlink "$sysroot/usr/bin/python3") # python3.11 on Debian 12

# 3. The core: setup.py's flags, then what setuptools and pybind11 add to them. The sysroot's /usr/include comes last:
# Python's headers want it for pyconfig.h alone, the C library's headers are the compiler's own.
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
"$host" tests/rules/neon_counts.py # what its convolution costs, in instructions

# 4. A copy of what the tests import, with this core, so that nothing can be taken from the work tree with its x86 one.
rm -rf "$tree" && mkdir "$tree"
tar -c --exclude='*.so' --exclude=__pycache__ --exclude=runtime/csrc pyproject.toml runtime tests | tar -x -C "$tree"
cp "$top/obj/_core.so" "$tree/runtime/_core.cpython-${python//[!0-9]/}-aarch64-linux-gnu.so"

# 5. The tests. Python goes through a wrapper that is its own sys.executable, so that a test can start another one.
# The emulated processor is a plain Armv8.0 one, as on small boards: an instruction that such a board lacks stops the
# run. It has no SVE either, with which NumPy's matrix product is slow here and warns of overflows that are not there.
printf '#!/bin/sh\nexec qemu-aarch64 -0 "$0" "${0%%/*}/%s" "$@"\n' "$python" >"$sysroot/usr/bin/python-in-qemu"
chmod +x "$sysroot/usr/bin/python-in-qemu"
unset PYTHONHOME LD_PRELOAD LD_LIBRARY_PATH
export QEMU_LD_PREFIX=$sysroot QEMU_CPU=${QEMU_CPU:-cortex-a72} PYTHONPATH=$tree:$site PYTHONNOUSERSITE=1
cd "$tree"
exec "$sysroot/usr/bin/python-in-qemu" -c 'import platform, sys, pytest, runtime._core as core
print("aarch64.sh:", platform.machine(), core.__file__, flush=True)
sys.exit(pytest.main(sys.argv[1:]))' -p no:cacheprovider "$@"
