#!/usr/bin/env bash
# Installs the wheel with several flavours of OpenCV and ONNX Runtime, each in a fresh environment in build/flavours/,
# and tests that pip check is clean, that the doctor describes them, and that pictures are segmented with what is there.
# Prints the size of each environment's packages in MB. pip is not among them: one copy of it serves all environments.
#     tests/rules/flavours.sh          the installations that run
#     tests/rules/flavours.sh sizes    also those with the demo photo, and with the exporter and PyTorch (minutes)
# The variable TORCH names the PyTorch of the exporter's size: torch==2.13.0+cpu is much smaller than the default.
# The variable PYTHON names the Python that builds the wheel and draws the input (with the packages of the tests), and
# that the environments are made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-$PWD/.venv/bin/python}
top=$PWD/build/flavours
rm -rf "$top" && mkdir -p "$top"
SEG_CUDA=0 "$python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$top" .
wheel=$(echo "$top"/*.whl)
mkdir "$top/tools" && cp -r "$("$python" -c 'import pip; print(*pip.__path__)')" "$top/tools/pip"
PYTHONPATH=tests/support "$python" - "$top" <<'PY'
import sys
import cv2
from drawn_pictures import quadrants
from one_layer_networks import nearest_colour, save
cv2.imwrite(f"{sys.argv[1]}/quadrants.png", quadrants()[0])
save(f"{sys.argv[1]}/prior.onnx", *nearest_colour())
PY
cd "$top" # here, Python imports the installed packages and not those of the clone

environment() { # name, packages: makes an environment, with the packages of the folder NAME.system if there is one
  local name=$1 bin=$top/$1/bin/python site
  shift
  "$python" -m venv --without-pip "$top/$name"
  site=$("$bin" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  [ ! -d "$top/$name.system" ] || echo "$top/$name.system" >"$site/system.pth"
  "$bin" "$top/tools/pip" install -q --disable-pip-version-check "$@"
  "$bin" "$top/tools/pip" check >/dev/null
  printf '%-10s %5d MB\n' "$name" "$(du -sm "$site" | cut -f1)"
}
doctor() { # name, pattern of a line that its doctor prints
  "$top/$1/bin/dg-runtime" doctor >"$top/$1.txt"
  grep -q "$2" "$top/$1.txt" || { echo "flavours.sh: the doctor of $1 does not print: $2" >&2 && exit 1; }
  ! grep "over each other" "$top/$1.txt" || exit 1
}
predict() { # name, exit code, options
  local name=$1 wanted=$2 code=0
  shift 2
  "$top/$name/bin/dg" predict quadrants.png -o "$name.out" "$@" &>"$name.log" || code=$?
  [ "$code" = "$wanted" ] || { cat "$name.log" && echo "flavours.sh: dg of $name ended with $code" >&2 && exit 1; }
}
both() { # name, pattern: an environment with both libraries
  doctor "$1" "$2"
  predict "$1" 0
  predict "$1" 0 --prior prior.onnx
}

environment bare "$wheel"
doctor bare 'missing: OpenCV is not installed'
doctor bare 'missing: ONNX Runtime is not installed'
predict bare 4
grep -q "fix: pip install 'dynaguide-edge\[run\]'" bare.log

environment run "$wheel[run]"
both run '^OpenCV .*(opencv-python [0-9.]*), windows'

environment headless "$wheel" opencv-python-headless onnxruntime
both headless '^OpenCV .*(opencv-python-headless .*), no windows'

environment contrib "$wheel" opencv-contrib-python onnxruntime
both contrib '^OpenCV .*(opencv-contrib-python .*), windows'

# As on a Jetson: the system has an OpenCV that was built for NumPy 1 and that pip does not know.
"$python" -m pip install -q --disable-pip-version-check --no-deps --target jetson.system opencv-python-headless==4.8.0.76
rm -r jetson.system/*.dist-info
environment jetson "$wheel" 'numpy<2'
doctor jetson '^OpenCV .*4.8.0 (of no pip package: .*jetson.system/'
predict jetson 0
predict jetson 4 --prior prior.onnx

[ "${1:-}" = sizes ] || exit 0
environment demo "$wheel[run,demo]"
environment export "$wheel[run,export]" "${TORCH:-torch}"
doctor export '^OpenCV .*(opencv-python [0-9.]*), windows'
