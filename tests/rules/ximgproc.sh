#!/usr/bin/env bash
# Compares the guided filter with OpenCV's ximgproc.guidedFilter, a function of the package
# opencv-contrib-python. That package replaces opencv-python, so the script installs it in an environment
# of its own; the two environments exchange arrays through files in build/ximgproc/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
top=build/ximgproc
[ -x "$top/venv/bin/python" ] || python3 -m venv "$top/venv"
"$top/venv/bin/python" -c 'import cv2.ximgproc' 2>/dev/null ||
  "$top/venv/bin/python" -m pip install -q --disable-pip-version-check opencv-contrib-python

"$python" - "$top" <<'PY'
import sys
import numpy as np, runtime
rng = np.random.default_rng(0)
image = rng.random((97, 131, 3), dtype=np.float32)
image[:, 60:] = image[:, 60:] * 0.3 + 0.5
values = rng.random((97, 131), dtype=np.float32)
values[40:] += 1
out = {"image": image, "values": values}
for radius in (2, 8):
    for eps in (1e-3, 1e-1):
        out[f"colour {radius} {eps}"] = runtime.guided_filter(image, values, radius=radius, eps=eps)
        out[f"grey {radius} {eps}"] = runtime.guided_filter(image[..., 1], values, radius=radius, eps=eps)
np.savez(sys.argv[1] + "/ours.npz", **out)
PY

"$top/venv/bin/python" - "$top" <<'PY'
import sys
import cv2, numpy as np
ours = dict(np.load(sys.argv[1] + "/ours.npz"))
image, values = ours.pop("image"), ours.pop("values")
failed = 0
for name, mine in ours.items():
    kind, radius, eps = name.split()
    guidance = image if kind == "colour" else np.ascontiguousarray(image[..., 1])
    # Levels are in 0..255 and eps is scaled to them: for levels in 0..1, OpenCV's colour filter treats
    # covariances with a small determinant as singular, with errors up to 0.3 (float64 agrees with ours).
    theirs = cv2.ximgproc.guidedFilter(guidance * 255, values, int(radius), float(eps) * 255**2)
    # OpenCV reflects the picture at its borders, ours cuts the windows: only the inside is compared.
    inside = slice(2 * int(radius), -2 * int(radius))
    error = float(np.abs(mine - theirs)[inside, inside].max())
    failed += error > 5e-5
    print(f"ximgproc {name}: largest difference {error:.1e}")
print(f"{len(ours) - failed} passed, {failed} failed")
sys.exit(failed > 0)
PY

[ "${1:-}" = time ] || exit 0
# tests/rules/ximgproc.sh time: milliseconds at 1920x1080, colour guidance, radius 8. Each time is the best of 5
# (of 20 in the fast form); the two libraries are measured in turn.
measure() { # python, threads
  PYTHONPATH=$PWD "$1" - "$2" <<'PY'
import sys, time
import cv2, numpy as np
threads = int(sys.argv[1])
cv2.setNumThreads(threads)
rng = np.random.default_rng(0)
guidance = rng.random((1080, 1920, 3), dtype=np.float32)
planes = {k: rng.random((1080, 1920, k), dtype=np.float32) for k in (1, 8)}
if hasattr(cv2, "ximgproc"):
    name = "ximgproc"
    runs = {f"{k} planes": lambda p=p: cv2.ximgproc.guidedFilter(guidance, p, 8, 1e-3) for k, p in planes.items()}
else:
    import runtime
    name = "ours"
    def run(g, p, **options): return runtime.guided_filter(g, p, eps=1e-3, threads=threads, **options)
    runs = {f"{k} planes{' fast' * (s > 1)}": lambda p=p, s=s: run(guidance, p, radius=8, subsample=s)
            for k, p in planes.items() for s in (1, 4)}
    runs["1 planes r=32"] = lambda: run(guidance, planes[1], radius=32)
    picture = rng.integers(0, 256, guidance.shape, np.uint8)  # a picture of bytes; results reuse memory
    outs = {k: np.zeros_like(p) for k, p in planes.items()}
    for k, p in planes.items():
        for s in (1, 4):
            runs[f"{k} planes{' fast' * (s > 1)}, bytes"] = (
                lambda k=k, p=p, s=s: run(picture, p, radius=8, subsample=s, out=outs[k]))
for what, f in runs.items():
    f()
    best = []
    for _ in range(20 if "fast" in what else 5):
        start = time.perf_counter()
        f()
        best.append(time.perf_counter() - start)
    print(f"{name:8} {threads} threads  {what:21} {1e3 * min(best):7.1f} ms")
PY
}
for threads in 1 2; do
  for turn in 1 2; do
    measure "$python" "$threads"
    measure "$top/venv/bin/python" "$threads"
  done
done
