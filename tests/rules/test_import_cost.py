"""What importing costs: the imports are run in interpreters of their own."""

import json
import os
import subprocess
import sys

from cases import case

HEAVY = (
    *("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "pycuda", "transformers"),
    *("safetensors", "scipy", "skimage", "tqdm"),
)


def run(program, **options):
    """The last line that ``program`` prints, as JSON, in a fresh interpreter outside the tree."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


IMPORT = """
import json, sys
import {module}
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
MEASURED = """
import json, resource, sys
import cv2, numpy
before = set(sys.modules)
start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
import sdk
seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - start
loaded = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps([seconds, sorted(loaded)]))
"""


def test_import_sdk_is_light(tmp_path, record_property):
    """What it costs beside NumPy and OpenCV, in this process's own time on a processor: other
    programs do not count. The first process compiles the sources, and is not counted either."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path / "compiled")
    measured = [run(MEASURED, cwd=tmp_path, env=environment) for _ in range(6)][1:]
    for _, loaded in measured:
        assert loaded == ["runtime", "sdk"]
    seconds = sorted(took for took, _ in measured)
    record_property("user_seconds", seconds)
    assert seconds[2] <= 0.10, seconds
    assert not set(run(IMPORT.format(module="sdk"), cwd=tmp_path)) & set(HEAVY)


def test_import_runtime_does_not_even_load_opencv(tmp_path):
    loaded = run(IMPORT.format(module="runtime"), cwd=tmp_path)
    assert not set(loaded) & {*HEAVY, "cv2", "sdk", "export", "benchmarks"}


def test_command_lines_and_tools_import_without_the_extras(tmp_path):
    for module in ("export", "benchmarks", "sdk.__main__", "benchmarks.__main__"):
        with case(module):
            loaded = run(IMPORT.format(module=module), cwd=tmp_path)
            assert not set(loaded) & (set(HEAVY) - {"tqdm"})


def test_segmenting_with_kmeans_loads_no_network_library(tmp_path):
    program = (
        "import json, sys, numpy as np\nfrom sdk import Segmenter\n"
        "Segmenter()(np.zeros((8, 9, 3), np.uint8))\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    assert not set(run(program, cwd=tmp_path)) & set(HEAVY)
