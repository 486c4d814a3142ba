"""The command line python -m runtime, and the bundles that it is asked about."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundles import CONFIG

from runtime.__main__ import main
from runtime.bundle.manifest import MANIFEST, file_entry, seal
from runtime.core import parameters
from runtime.device.driver import cuda_problem

ROOT = Path(__file__).resolve().parents[2]
SIZE, CLASSES = (24, 32), 3
no_gpu = pytest.mark.skipif(cuda_problem() is None, reason="says what is said without a GPU")


def shapes(graphs):
    """Least, usual and largest shape of every free input: all for one picture size."""
    weights, _ = parameters.shapes(CONFIG, CLASSES)
    sizes = dict(zip(("height", "width"), SIZE, strict=True)) | {"classes": CLASSES}
    sizes["parameters"] = sum(int(np.prod(s)) for s in weights.values())
    out = {}
    for name, graph in graphs.items():
        free = [p for p in graph["inputs"] if any(isinstance(n, str) for n in p["shape"])]
        out[name] = {p["name"]: [[sizes.get(n, n) for n in p["shape"]]] * 3 for p in free}
    return out


def change(bundle, edit):
    """Edit the manifest and seal it again."""
    path = bundle / MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(seal(manifest)))


def put(bundle, entry, data):
    """Replace a file and its entry in the sealed manifest."""
    (bundle / entry["file"]).write_bytes(data)

    def edit(manifest):
        every = [*manifest["graphs"].values(), *manifest["engines"], *manifest["golden"]]
        for other in [*every, manifest["init"]]:
            if other["file"] == entry["file"]:
                other |= file_entry(entry["file"], data)

    change(bundle, edit)


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def answer(capsys, *arguments):
    """Exit code and the one JSON document of a command."""
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def text(capsys, *arguments):
    code = main([*map(str, arguments)])
    return (code, *capsys.readouterr())


def process(*arguments, **options):
    command = [sys.executable, "-m", "runtime", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=600, **options
    )
