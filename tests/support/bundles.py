"""Small bundles, written in milliseconds, that load and pass their golden test."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import stat
from pathlib import Path

import numpy as np

from export.refine_step import build_map, build_step
from runtime.bundle import golden, manifest
from runtime.bundle.manifest import (
    file_entry,
    golden_entry,
    graph_entry,
    kmeans_prior,
    licence_entry,
    make_manifest,
    network_prior,
)
from runtime.bundle.read import Bundle
from runtime.bundle.write import write_bundle
from runtime.core import parameters
from runtime.core.config import RefineConfig
from runtime.core.refiner import Refiner
from runtime.core.resize import working_picture
from runtime.engines.onnx import OnnxEngine
from runtime.prior.kmeans import KMeansPrior
from runtime.prior.network import NetworkPrior
from runtime.prior.preprocess import Preprocess

CONFIG = RefineConfig(channels=4, steps=3, scale=1.0)
PREPROCESS = Preprocess(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), height=24, width=32, color="rgb"
)
COLOURS = np.array([[200, 40, 40], [40, 180, 60], [40, 60, 200]], np.uint8)


def picture(height=24, width=32):
    """Three bands of colour, with noise: (height, width, 3) uint8."""
    truth = np.arange(width) * 3 // width
    noise = np.random.default_rng(0).integers(-20, 21, (height, width, 3))
    return np.clip(COLOURS[truth][None] + noise, 0, 255).astype(np.uint8)


def native(config=CONFIG):
    """What runtime.core.refiner.refine_with makes its refiner with: the native core."""

    def make(height, width, classes):
        count = None if classes is None else len(classes)
        return Refiner(height, width, classes=count, **config.options())

    return make


def nearest_colour(scale=5.0):
    """One 1x1 convolution that scores each of COLOURS by its distance, as ONNX bytes.

    -|x - c|^2 + |x|^2 = 2 c.x - |c|^2, with x = std * input + mean.
    """
    from onnx import TensorProto, helper, numpy_helper

    c, mean, std = COLOURS / 255, np.array(PREPROCESS.mean), np.array(PREPROCESS.std)
    weight = (scale * 2 * c * std).astype(np.float32)[..., None, None]
    bias = (scale * (2 * c @ mean - (c**2).sum(1))).astype(np.float32)
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 3, 24, 32))
        for name in ("image", "scores")
    ]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "weight", "bias"], ["scores"])],
        "network",
        ports[:1],
        ports[1:],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def tensors(arrays):
    from safetensors.numpy import save

    # np.ascontiguousarray would give a counter of no dimension one of one
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def golden_of(shot, prior, config, refiner, *, size=None, warm=False):
    """Golden arrays of a picture and a prior, and the number of steps, as an export makes them."""
    low = working_picture(shot, *(size or config.working_size(*shot.shape[:2])))
    fed = prior.preprocess(shot) if isinstance(prior, NetworkPrior) else None
    guide = np.asarray(prior(shot, low))
    return golden.make(shot, guide, config, refiner, low=low, warm=warm, network_input=fed)


def tiny_parts(*, with_network=False):
    """(manifest, files) of a small bundle: k-means as prior, or a network of one layer."""
    return copy.deepcopy(_tiny_parts(with_network))


@functools.cache
def _tiny_parts(with_network):
    files = {
        "refine_step.onnx": build_step(CONFIG).SerializeToString(),
        "refine_map.onnx": build_map(CONFIG).SerializeToString(),
    }
    prior = KMeansPrior(3)
    if with_network:
        files["prior.onnx"] = nearest_colour()
        prior = NetworkPrior(OnnxEngine(files["prior.onnx"], threads=1), PREPROCESS)
    graphs = {}
    for file, data in files.items():
        with OnnxEngine(data, threads=1) as engine:
            graphs[file.removesuffix(".onnx")] = graph_entry(
                file, data, opset=18, inputs=engine.inputs, outputs=engine.outputs
            )
    files["init.safetensors"] = tensors(parameters.initial_state(CONFIG, 3))
    arrays, steps = golden_of(picture(), prior, CONFIG, native())
    files["golden/000.safetensors"] = tensors(arrays)
    files["LICENSE.model"] = b"nobody's: public domain\n"
    entry, plan = tiny_engine()
    files[entry["file"]] = plan
    golden_file = "golden/000.safetensors"
    manifest = make_manifest(
        name="tiny.bundle",
        created="2025-01-01T00:00:00Z",
        sdk="0.1.0",
        model={"name": "tiny", "trained": with_network},
        prior=network_prior("logits") if with_network else kmeans_prior(3, 12.0),
        preprocess=PREPROCESS if with_network else None,
        classes=["brick", "grass", "sea"] if with_network else None,
        graphs=graphs,
        refine=CONFIG,
        init=file_entry("init.safetensors", files["init.safetensors"]),
        engines=[entry],
        golden=[golden_entry(golden_file, files[golden_file], steps)],
        verification={"pictures": ["none"], "refine": {"update": 1e-7, "agreement": 1.0}},
        recipe={
            "command": "",
            "targets": ["onnx"],
            "compute_capabilities": [],
            "workspace": None,
            "level": None,
            "dynamic": False,
            "shapes": {name: {} for name in graphs},
        },
        licence=licence_entry("LICENSE.model", files["LICENSE.model"], "public domain"),
    )
    return manifest, files


def tiny_engine(key="0123456789abcdef", plan=b"ptrt and then no engine at all"):
    """(entry, plan) of an engine that is none."""
    file = f"engines/{key}.engine"
    entry = file_entry(file, plan) | {
        "key": key,
        "graph": "refine_map",
        "runtime": "tensorrt_rtx",
        "version": "1.7.1.116",
        "compute_capabilities": ["8.6"],
        "gpu_name": None,
        "l4t": None,
        "platform": "linux-x86_64",
        "shapes": {},
        "flags": {},
        "receipt": {"layers": {"fp32": 1}, "source": "parser"},
        "seconds": 0.5,
        "inputs": [],
        "outputs": [],
    }
    return entry, plan


def tiny_bundle(path, *, with_network=False):
    """Write a small valid bundle to ``path``; returns it opened."""
    return write_bundle(path, *tiny_parts(with_network=with_network))


# Looking at bundles


def lay(folder, files):
    """Let ``folder`` contain these files and nothing else. A regular file that has the right bytes
    already is not written again, because removing and making files takes most of the time."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
    folders = {folder / file for file in files for file in Path(file).parents}
    right = set()
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        info = path.lstat() if os.path.lexists(path) else None
        name = path.relative_to(folder).as_posix()
        if info is None or (stat.S_ISDIR(info.st_mode) and path in folders):
            continue
        regular = stat.S_ISREG(info.st_mode) and info.st_nlink == 1
        if regular and name in files and info.st_size == len(files[name]):
            if path.read_bytes() == files[name]:
                right.add(name)
                continue
        if stat.S_ISDIR(info.st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()
    for file, data in files.items():
        if file not in right:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)


def listing(folder, skip):
    """Path, size, time and kind of everything beside ``skip``."""
    out = []
    for top, folders, files in os.walk(folder):
        if Path(top) == skip.parent and skip.name in folders:
            folders.remove(skip.name)
        for name in (*folders, *files):
            info = os.lstat(os.path.join(top, name))
            out.append((top, name, info.st_size, info.st_mtime_ns, info.st_mode))
    return sorted(out)


@functools.lru_cache(maxsize=64)
def ports(data):
    with OnnxEngine(data, threads=1) as engine:
        return engine.inputs, engine.outputs


def read_all(folder):
    """Open and read everything in a bundle: (manifest, bytes by file)."""
    bundle = Bundle.open(folder)
    bundle.check_files()
    for name in bundle.manifest["graphs"]:
        bundle.check_ports(name, *ports(bundle.graph(name)))
    bundle.tensors(bundle.manifest["init"])
    for entry in bundle.manifest["golden"]:
        bundle.tensors(entry)
    bundle.preprocess()
    bundle.refine()
    return bundle.manifest, {e["file"]: bundle.read(e) for e in manifest.entries(bundle.manifest)}
