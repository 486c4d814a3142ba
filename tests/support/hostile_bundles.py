"""Changes that make a bundle hostile, and the check that reading it ends in one clean error."""

import copy
import json
import random
import signal
import time
from contextlib import contextmanager

import pytest

from runtime.bundle import golden
from runtime.bundle.manifest import MANIFEST, file_entry, seal
from runtime.bundle.read import Bundle
from runtime.bundle.write import write_bundle
from runtime.engines.onnx import OnnxEngine
from runtime.errors import BundleError, EngineMismatch
from runtime.prior.kmeans import KMeansPrior
from runtime.prior.network import NetworkPrior

onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")
from bundles import lay, listing, native, read_all, tiny_parts  # noqa: E402 (after importorskip)

NAMES = ("kmeans", "network")

MOST_SECONDS = 1.0  # of processor time, one case
HANG = 20  # seconds


def seal_bytes(manifest):
    """Sealed as far as it can be: what cannot be hashed keeps its old hash."""
    try:
        manifest = seal(manifest)
    except (ValueError, RecursionError):
        pass
    return json.dumps(manifest).encode()


def at(manifest, where):
    """The value at a dotted place; numbers index lists."""
    for key in where.split("."):
        manifest = manifest[int(key) if isinstance(manifest, list) else key]
    return manifest


@contextmanager
def watchdog(label):
    def bark(*_):
        raise AssertionError(f"{label} hangs")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_golden(folder):
    """The golden test on the native core, with the bundle's prior."""
    bundle = Bundle.open(folder)
    entry = bundle.manifest["prior"]
    if entry["kind"] == "network":
        engine = OnnxEngine(bundle.graph("prior"), threads=1)
        bundle.check_ports("prior", engine.inputs, engine.outputs)
        prior = NetworkPrior(engine, bundle.preprocess(), output=entry["output"])
    else:
        prior = KMeansPrior(entry["clusters"], entry["temperature"])
    config = bundle.refine()
    for item in bundle.manifest["golden"]:
        arrays = bundle.tensors(item)
        golden.compare(arrays, item["steps"], prior, config, native(config), name=bundle.name)


def assert_is_one_refusal(error, label):
    text = str(error)
    assert text.count("\n  fix: ") == 1 and error.fix, f"{label}: {text!r}"
    assert len(text) < 2000, f"{label}: a message of {len(text)} characters"


def attempt(folder, label, read=read_all):
    """What ``read`` gives, or None after a refusal that is as it should be."""
    before = listing(folder.parent, folder)
    start, result = time.process_time(), None
    with watchdog(label):
        try:
            result = read(folder)
        except (BundleError, EngineMismatch) as error:
            assert_is_one_refusal(error, label)
        except Exception as error:  # whatever else it is, name the case
            raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
    assert time.process_time() - start < MOST_SECONDS, f"{label} takes too long"
    assert listing(folder.parent, folder) == before, f"{label} wrote outside"
    return result


# Bytes


def damage(rng, data):
    """One of the accidents and tricks that happen to bytes; never the same bytes."""
    while True:
        out, i = bytearray(data), rng.randrange(len(data))
        j = min(len(data), i + rng.choice([1, 2, 8, 64, 500]))
        kind = rng.randrange(9)
        if kind == 0:
            out[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[i:]
        elif kind == 2:
            out[i:i] = rng.randbytes(rng.choice([1, 4, 100]))
        elif kind == 3:
            del out[i:j]
        elif kind == 4:
            out[i:j] = rng.randbytes(j - i)
        elif kind == 5:
            out[i:i] = out[i:j]
        elif kind == 6:
            out[i:j] = bytes(j - i)
        elif kind == 7:
            out[i:j] = b"\xff" * (j - i)
        else:
            out += rng.randbytes(rng.choice([1, 100]))
        if bytes(out) != data:
            return bytes(out)


# Files that fit their hash, with anything in them


def put(place, pristine, where, data, name="network"):
    """A bundle with other bytes at ``where``, hashed and sealed."""
    manifest, files = copy.deepcopy(pristine[name])
    entry = at(manifest, where)
    entry.update(file_entry(entry["file"], data))
    files[entry["file"]] = data
    lay(place, files | {MANIFEST: seal_bytes(manifest)})


def everything(folder):
    result = read_all(folder)
    run_golden(folder)
    return result


def graph_cases(folder, count):
    """Run ``count`` damaged graphs with fitting hashes; a line before and after each."""
    parts = tiny_parts(with_network=True)
    whole = write_bundle(folder / "whole.bundle", *parts)
    pristine = {"network": (whole.manifest, parts[1])}
    place = folder / "x.bundle"
    for seed in range(count):
        rng = random.Random(seed)
        graph = rng.choice(["prior", "prior", "refine_map", "refine_step"])
        print("case", graph, "seed", seed, flush=True)
        data = damage(rng, parts[1][f"{graph}.onnx"])
        if seed % 3 == 0:  # stays a valid protobuf message
            data = twisted(rng, parts[1][f"{graph}.onnx"])
        put(place, pristine, f"graphs.{graph}", data)
        result = attempt(place, f"{graph} seed {seed}", everything)
        print("loads" if result else "refused", flush=True)


def twisted(rng, data):
    """A graph with another operator, wire, attribute, shape or tensor type."""
    model = onnx.load_from_string(data)
    graph = model.graph
    node = rng.choice(graph.node)
    kind = rng.randrange(7)
    if kind == 0:
        node.op_type = rng.choice(["Identity", "Loop", "If", "Gemm", "Reshape", "Expand", "Nope"])
    elif kind == 1:
        node.input[rng.randrange(len(node.input))] = rng.choice([*node.output, "image", "", "zz"])
    elif kind == 2:
        model.opset_import[0].version = rng.choice([0, 1, 7, 999, -1, 2**31])
    elif kind == 3 and graph.initializer:
        rng.choice(graph.initializer).dims[:] = [rng.choice([0, -1, 2**31, 2**62])]
    elif kind == 4 and graph.initializer:
        rng.choice(graph.initializer).data_type = rng.choice([0, 2, 6, 7, 8, 11, 16, 999])
    elif kind == 5:
        shape = graph.input[0].type.tensor_type.shape
        shape.dim[rng.randrange(4)].dim_value = rng.choice([0, -1, 1, 2**31, 2**62])
    else:
        graph.node.remove(node)
    return model.SerializeToString()
