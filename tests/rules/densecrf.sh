#!/usr/bin/env bash
# Compares runtime.dense_crf with the package pydensecrf2, a build of the authors' code. It has no wheel: pip
# compiles it, in an environment of its own; the two environments exchange arrays through files in
# build/densecrf/. The pictures are the demo photo and, with SEG_DATA, four CamVid frames and one of DAVIS, whose
# probabilities are those of the ESPNetv2 networks of SEG_DATA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
top=build/densecrf
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
[ -x "$top/venv/bin/python" ] || python3 -m venv "$top/venv"
"$top/venv/bin/python" -c 'import pydensecrf.densecrf' 2>/dev/null || {
  pip=("$top/venv/bin/python" -m pip install -q --disable-pip-version-check)
  "${pip[@]}" numpy cython setuptools wheel
  "${pip[@]}" pydensecrf2==1.1
}

# Both programs read NAME.npz, write NAME.ours.npy or NAME.theirs.npy, and print the seconds of CPU that each
# file took, from the arrays to the probabilities.
cat >"$top/ours.py" <<'PY'
import sys, time
import numpy as np, runtime
for name in sys.argv[1:]:
    z = np.load(name + ".npz")
    image, p = z["image"], z["p"]
    start = time.process_time()
    q = runtime.dense_crf(image, p, threads=1)
    print(time.process_time() - start, flush=True)
    np.save(name + ".ours.npy", q)
PY
cat >"$top/theirs.py" <<'PY'
import sys, time
import numpy as np, pydensecrf.densecrf as dcrf
options = {"kernel": dcrf.DIAG_KERNEL, "normalization": dcrf.NORMALIZE_SYMMETRIC}
for name in sys.argv[1:]:
    z = np.load(name + ".npz")
    image, p = z["image"], z["p"]
    h, w, classes = p.shape
    start = time.process_time()
    crf = dcrf.DenseCRF2D(w, h, classes)
    unary = -np.log(np.maximum(p, 1e-5)).reshape(-1, classes).T
    crf.setUnaryEnergy(np.ascontiguousarray(unary, np.float32))
    crf.addPairwiseGaussian(sxy=1, compat=3, **options)
    crf.addPairwiseBilateral(sxy=67, srgb=3, rgbim=image, compat=4, **options)
    q = np.array(crf.inference(10))
    print(time.process_time() - start, flush=True)
    np.save(name + ".theirs.npy", q.reshape(classes, h, w).transpose(1, 2, 0))
PY

rm -f "$top"/*.npz "$top"/*.npy
"$python" - "$top" <<'PY'
import os, sys
from pathlib import Path
import cv2, numpy as np
from runtime.pictures.files import demo_photo
top, data = Path(sys.argv[1]), os.environ.get("SEG_DATA")

def save(name, image, scores):
    """Write a picture and the soft-max of its scores (h, w, K), resized to the picture."""
    h, w = image.shape[:2]
    planes = [cv2.resize(s, (w, h)) for s in np.moveaxis(scores.astype(np.float32), -1, 0)]
    p = np.exp(np.stack(planes, -1) - np.max(planes, 0)[..., None])
    np.savez(top / name, image=image, p=p / p.sum(-1, keepdims=True))

rng = np.random.default_rng(0)
photo = np.ascontiguousarray(demo_photo())
for classes in (2, 5, 14, 20):  # scores: the distance to random colours, and noise of 64 x 64 values
    colours = rng.uniform(0, 255, (classes, 3))
    small = cv2.resize(photo, (64, 64), interpolation=cv2.INTER_AREA)
    distance = ((small[:, :, None] - colours) ** 2).sum(-1) / 255**2
    save(f"demo photo, {classes} classes", photo, rng.normal(0, 1, distance.shape) - 10 * distance)

def scores_of(kind, image, size):
    import onnxruntime
    net = onnxruntime.InferenceSession(f"{data}/priors/espnetv2_s0.5_{kind}.onnx",
                                       providers=["CPUExecutionProvider"])
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    x = (cv2.resize(image, size, interpolation=cv2.INTER_AREA) / np.float32(255) - mean) / std
    return np.moveaxis(net.run(None, {"image": np.moveaxis(x, -1, 0)[None]})[0][0], 0, -1)

def picture(path):
    return np.ascontiguousarray(cv2.imread(str(path))[..., ::-1])

if data:
    frames = sorted(Path(data, "camvid/train").glob("*.png"))
    for i, path in enumerate(frames[:: len(frames) // 4][:4]):
        image, classes = picture(path), (14, 16, 18, 20)[i]
        scores = scores_of("cityscapes_512x256", image, (480, 352))
        save(f"CamVid {i}, {classes} classes", image, scores[..., :classes])
    image = picture(Path(data, "davis/frames/dog/00020.jpg"))
    save("DAVIS dog, 21 classes", image, scores_of("voc_256x256", image, (432, 240)))
PY

names=()
for file in "$top"/*.npz; do names+=("${file%.npz}"); done
"$python" "$top/ours.py" "${names[@]}" >/dev/null
"$top/venv/bin/python" "$top/theirs.py" "${names[@]}" >/dev/null
"$python" - "${names[@]}" <<'PY'
import sys
from pathlib import Path
import numpy as np
failed = 0
for name in sys.argv[1:]:
    before, ours, theirs = np.load(name + ".npz")["p"], np.load(name + ".ours.npy"), np.load(name + ".theirs.npy")
    labels = ours.argmax(-1)
    equal = (labels == theirs.argmax(-1)).mean()
    failed += not equal >= 0.999
    print(f"pydensecrf2, {Path(name).name:22} {labels.shape[1]}x{labels.shape[0]}: {100 * equal:.4f} % equal labels, largest "
          f"difference {np.abs(ours - theirs).max():.1e}; the CRF changed {100 * (labels != before.argmax(-1)).mean():.2f} %")
print(f"{len(sys.argv) - 1 - failed} passed, {failed} failed")
sys.exit(failed > 0)
PY

[ "${1:-}" = time ] || exit 0
# tests/rules/densecrf.sh time: seconds of CPU on one thread, 7 turns of a new process of each library in turn, whose
# second call counts: new memory is slow in the first. Then our cost at three sizes, each in a new process. The
# pictures are CamVid frames with SEG_DATA, else the demo photo, whose dark parts make it cheaper.
"$python" - "$top" <<'PY'
import sys
from pathlib import Path
import cv2, numpy as np
top = Path(sys.argv[1])
for i, classes in ((0, 14), (3, 20)):
    frame = top / f"CamVid {i}, {classes} classes.npz"
    z = np.load(frame if frame.exists() else top / f"demo photo, {classes} classes.npz")
    image, p = z["image"], z["p"]
    if image.shape[:2] != (360, 480):
        image = cv2.resize(image[64:448], (480, 360), interpolation=cv2.INTER_AREA)
        p = np.stack([cv2.resize(plane[64:448], (480, 360)) for plane in np.moveaxis(p, -1, 0)], -1)
    np.savez(top / f"time{classes}", image=image, p=p)
PY
for classes in 14 20; do
  : >"$top/turns"
  for turn in 1 2 3 4 5 6 7; do
    ours=$("$python" "$top/ours.py" "$top/time$classes" "$top/time$classes" | tail -1)
    theirs=$("$top/venv/bin/python" "$top/theirs.py" "$top/time$classes" "$top/time$classes" | tail -1)
    echo "$ours $theirs" >>"$top/turns"
  done
  "$python" - "$classes" "$top/turns" <<'PY'
import sys
import numpy as np
ours, theirs = np.loadtxt(sys.argv[2]).T
ratios = theirs / ours
print(f"480x360, {sys.argv[1]} classes: ours {np.median(ours):.3f} s, pydensecrf2 {np.median(theirs):.3f} s of CPU; "
      f"ratio {np.median(ratios):.2f}, by turn {' '.join(f'{r:.2f}' for r in ratios)}")
PY
done
for threads in 1 2; do
  for size in 480x360 960x720 1920x1080; do
    "$python" - "$top/time20.npz" "$size" "$threads" <<'PY'
import resource, sys, time
import cv2, numpy as np, runtime
w, h = map(int, sys.argv[2].split("x"))
z = np.load(sys.argv[1])
image = cv2.resize(z["image"], (w, h), interpolation=cv2.INTER_CUBIC)
p = np.stack([cv2.resize(plane, (w, h)) for plane in np.moveaxis(z["p"], -1, 0)], -1)
out = np.zeros_like(p)
del z
def run(image, p, out):
    start = time.perf_counter()
    runtime.dense_crf(image, p, threads=int(sys.argv[3]), out=out)
    return time.perf_counter() - start
run(image[:90, :120], p[:90, :120].copy(), out.reshape(-1)[:216000].reshape(90, 120, 20))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
seconds = [run(image, p, out) for _ in range(5 if w < 1000 else 3)]
print(f"{sys.argv[2]:9} 20 classes, {sys.argv[3]} threads: {np.median(seconds):.3f} s, {1e9 * np.median(seconds) / w / h:.0f} ns "
      f"per pixel, {peak() - before:.0f} MiB more than before the calls, arrays {(p.nbytes + out.nbytes + image.nbytes) >> 20} MiB")
PY
  done
done
