"""runtime/bundle.py against damaged and hostile bundles: some 3,000 of them.

Every case ends in one BundleError with one fix line, quickly, with nothing written outside; or,
where what the bundle says is the same or was sealed again, in that manifest and the same bytes.
"""

import copy
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from runtime import bundle as module
from runtime import golden
from runtime.bundle import (
    MANIFEST,
    Bundle,
    file_entry,
    load_tensors,
    seal,
    write_bundle,
)
from runtime.engine import OnnxEngine
from runtime.errors import BundleError, EngineMismatch, InputError, MissingBackend
from runtime.prior import KMeansPrior, NetworkPrior

onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")

from bundles import (  # noqa: E402
    lay,
    listing,
    native,
    ports,
    read_all,
    tensors,
    tiny_bundle,
    tiny_engine,
    tiny_parts,
)

NAMES = ("kmeans", "network")
ENTRIES = ("graphs.prior", "graphs.refine_step", "graphs.refine_map", "init", "engines.0",
           "golden.0", "licence")  # fmt: skip
MOST_SECONDS = 1.0  # of processor time, one case
HANG = 20  # seconds


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """name -> (manifest, files with the manifest's own, by path)."""
    out = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp("pristine") / name
        bundle = tiny_bundle(folder, with_network=name == "network")
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
        assert len(files) == (8 if name == "network" else 7)
        out[name] = (bundle.manifest, files)
    return out


@pytest.fixture
def place(tmp_path):
    """Where a bundle goes, beside things that must stay as they are."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.bin").write_bytes(b"keep me")
    return tmp_path / "x.bundle"


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


@pytest.mark.parametrize("name", NAMES)
def test_the_bundles_that_are_mutated_load(pristine, place, name):
    manifest, files = pristine[name]
    lay(place, files)
    loaded, data = attempt(place, name)
    assert loaded == manifest and data == {k: v for k, v in files.items() if k != MANIFEST}
    run_golden(place)
    bundle = Bundle.open(place)
    assert bundle.name == "x.bundle" and bundle.names == manifest["classes"]


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


@pytest.mark.parametrize("name", NAMES)
def test_400_damaged_manifests(pristine, place, name):
    manifest, files = pristine[name]
    lay(place, files)
    same = 0
    for seed in range(400):
        rng = random.Random(seed)
        data = damage(rng, files[MANIFEST])
        if seed % 20 == 0:  # white space changes nothing
            spot = rng.choice([i for i, byte in enumerate(files[MANIFEST]) if byte in b"\n:,{["])
            data = files[MANIFEST][: spot + 1] + b" \n\t" + files[MANIFEST][spot + 1 :]
        (place / MANIFEST).write_bytes(data)
        result = attempt(place, f"{name} seed {seed}")
        if result is not None:
            same += 1
            assert result[0] == manifest and module._canonical(result[0]) == module._canonical(
                manifest
            ), f"seed {seed} loads something else"
    assert 5 <= same < 100  # mostly refused


@pytest.mark.parametrize("name", NAMES)
def test_300_damaged_files_whose_hash_does_not_fit(pristine, place, name):
    _, files = pristine[name]
    for seed in range(300):
        rng = random.Random(seed)
        file = rng.choice(sorted(set(files) - {MANIFEST}))
        lay(place, files | {file: damage(rng, files[file])})
        assert attempt(place, f"{name} {file} seed {seed}") is None


# The manifest's content, sealed again

DEEP = functools.reduce(lambda inner, _: [inner], range(18), 0)
VALUES = [
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, float("inf"), float("nan"), 2**31, 2**63,
    -(2**63), 10**400, "", " ", "fp32", "kmeans", "network", "../x", "/etc/passwd", "a\\b", ".",
    "..", "x\0y", "\x1b[2J", "\ud800", "é" * 50, "A" * 200_000, [], [None], [[]], {}, {"a": 1},
    DEEP, ["x"] * 1000, "NaN", "1e999", MANIFEST, "0" * 64,
]  # fmt: skip
# What a bundle may say otherwise and still be one: words, records, settings in their range.
FREE = ("verification", "recipe", "created", "sdk", "name", "classes", "model", "licence.text",
        "refine", "preprocess", "prior", "golden", "engines", "graphs")  # fmt: skip
FIXED = (".file", ".sha256", ".size", ".dtype", ".shape", ".key", ".runtime", ".kind")


def places(value, where=""):
    """Every dotted place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items if isinstance(value, (dict, list)) else ():
        yield (spot := f"{where}.{key}".lstrip("."))
        if isinstance(item, (dict, list)):
            yield from places(item, spot)


def rewrite(rng, manifest):
    """Change one place of the manifest: the place."""
    where = rng.choice(list(places({k: v for k, v in manifest.items() if k != "sha256"})))
    parent, _, key = where.rpartition(".")
    holder = at(manifest, parent) if parent else manifest
    index = int(key) if isinstance(holder, list) else key
    kind = rng.randrange(8)
    if kind == 0:
        del holder[index]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["unknown", "", "é", "\ud800", "K" * 100_000, f"{key} "])] = 1
    elif kind == 2 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[index]))
    elif kind == 3:  # from elsewhere
        holder[index] = copy.deepcopy(at(manifest, rng.choice(list(places(manifest)))))
    else:
        holder[index] = copy.deepcopy(rng.choice(VALUES))
    return where


@pytest.mark.parametrize("name", NAMES)
def test_450_rewritten_and_sealed_manifests(pristine, place, name):
    original, files = pristine[name]
    lay(place, files)
    loaded = 0
    for seed in range(450):
        manifest = copy.deepcopy(original)
        where = rewrite(random.Random(seed), manifest)
        (place / MANIFEST).write_bytes(seal_bytes(manifest))
        label = f"{name} {where} seed {seed}"
        result = attempt(place, label)
        if result is None:
            continue
        loaded += 1
        got, data = result
        if got != original:
            assert where.startswith(FREE), label
            removed = len(got["engines"]) + len(got["golden"]) < 2
            assert removed or not where.endswith(FIXED), label
            assert got == seal(manifest), f"{label}: loads something else"
        assert all(data[file] == files[file] for file in data), label
        attempt(place, f"{label}, golden", run_golden)
    assert 20 < loaded < 500


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "cannot be read: Expecting value"),
        ("null", "has schema of type NoneType"),
        ("[]", "has schema of type NoneType"),
        ('"dg-bundle/1"', "has schema of type NoneType"),
        ('{"schema": "dg-bundle/2"}', "has schema 'dg-bundle/2'; this version reads 'dg-bundle/1'"),
        ('{"schema": [[1]]}', "has schema of type list"),
        ('{"schema": "dg-bundle/1"}', r"manifest lacks \['classes', 'created'"),
        (
            '{"schema": "dg-bundle/1", "schema": "dg-bundle/1"}',
            "cannot be read: a key comes twice among",
        ),
        ('{"a": NaN}', "cannot be read: NaN is no JSON number"),
        ('{"a": -Infinity}', "cannot be read: -Infinity is no JSON number"),
        ("[" * 100_000, "cannot be read"),
        ('{"a":' * 100_000, "cannot be read"),
        ("[" * 100_000 + "]" * 100_000, "cannot be read: maximum recursion depth"),
        ("9" * 5000, "cannot be read"),
        ("\ufeff{}", "cannot be read"),
        (" " * 2**22 + "{}", "has 4194306 bytes; at most 4194304"),
        (b"\xff\xfe{}", "cannot be read: 'utf-8' codec"),
        (b"{}\0", "cannot be read: Extra data"),
        ("{} {}", "cannot be read: Extra data"),
    ],
    ids=range(19),
)
def test_manifests_that_are_none(pristine, place, text, match):
    lay(place, pristine["kmeans"][1])
    (place / MANIFEST).write_bytes(text.encode() if isinstance(text, str) else text)
    assert attempt(place, match) is None
    with pytest.raises(
        BundleError, match=rf"x.bundle/manifest.json {match}|manifest.json: {match}"
    ):
        Bundle.open(place)


def change(pristine, place, where, value, name="network"):
    """A bundle with another value at ``where``, sealed again."""
    original, files = pristine[name]
    manifest = copy.deepcopy(original)
    parent, _, key = where.rpartition(".")
    holder = at(manifest, parent) if parent else manifest
    holder[int(key) if isinstance(holder, list) else key] = value
    lay(place, files | {MANIFEST: seal_bytes(manifest)})
    return place


@pytest.mark.parametrize(
    ("where", "value", "match"),
    [
        ("init.size", -1, "manifest.init.size is '-1', which does not fit"),
        ("init.size", 2**31, "manifest.init.size is '2147483648'"),
        ("init.size", 1.0, "manifest.init.size"),
        ("init.size", True, "manifest.init.size is 'True'"),
        ("init.sha256", "0" * 63, "manifest.init.sha256"),
        ("init.sha256", "0" * 64, "init.safetensors has sha256 .*the manifest says 0000000000000"),
        ("graphs.prior.file", "refine_map.onnx", "lists a file twice, or itself"),
        ("graphs.prior.file", MANIFEST, "lists a file twice, or itself"),
        ("graphs.prior.shape", [1], r"unknown \['shape'\]"),
        ("graphs.other", {}, r"manifest.graphs lacks \[\] or has unknown \['other'\]"),
        ("engines.0.graph", "cnn", "engine for an unknown graph 'cnn'"),
        ("engines.0.seconds", float("inf"), "cannot be read: Infinity is no JSON number"),
        ("engines.0.key", "../../etc/passwd", r"manifest.engines\[0\].key"),
        ("golden.0.steps", 10**6, r"manifest.golden\[0\].steps is '1000000'"),
        ("prior", {"kind": "kmeans", "clusters": 3, "temperature": 1.0}, "do not fit together"),
        ("prior", {"kind": "kmeans", "clusters": 3, "temperature": -1}, "manifest.prior"),
        ("preprocess", None, "prior, graphs and preprocess do not fit together"),
        ("preprocess.mean", [123, 116, 103], "preprocess: mean is .*wanted numbers for values in"),
        ("preprocess.mean", [10**400, 0, 0], "preprocess: mean is .1000"),
        ("preprocess.height", 10**9, "preprocess: height, width"),
        ("preprocess.order", "other", "names an order or layout that this version does not know"),
        ("preprocess.code", "import os", r"preprocess has \['code'"),
        ("refine.lr", 10**400, "refine: lr is 1000"),
        ("refine.scale", 10**400, "refine: "),
        ("refine.steps", 10**7, "refine: steps is 10000000"),
        ("refine.device", "cuda", "refine: .*unexpected keyword"),
        ("refine.objective", ["residual"], "refine: objective is"),
        ("refine.lr", "A" * 10**6, "refine: lr is 'A{200}.*[.]{3}"),
        ("classes", ["\ud800"], "surrogates not allowed"),
        ("classes", ["\x1b]0;owned\x07"], r"manifest.classes\[0\] is"),
        ("name", "a/b", "manifest.name is 'a/b'"),
        ("recipe", DEEP, "manifest.recipe is"),
        ("recipe", {"x": DEEP}, "lists and objects are nested more than 20 deep"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_what_the_manifest_may_not_say(pristine, place, where, value, match):
    change(pristine, place, where, value)
    assert attempt(place, match) is None
    with pytest.raises(BundleError, match=f"(?s){match}"):
        read_all(place)


@pytest.mark.parametrize("depth", [15, 16, 300, 700, 900, *range(940, 1000, 4), 1500, 50_000])
def test_nested_manifests(pristine, place, depth):
    _, files = pristine["kmeans"]
    text = files[MANIFEST].decode()
    deep = '"recipe": {"x": ' + "[" * depth + "]" * depth + ","
    lay(place, files | {MANIFEST: text.replace('"recipe": {', deep).encode()})
    assert attempt(place, f"depth {depth}") is None


def test_a_changed_manifest_is_seen(pristine, place):
    lay(place, pristine["kmeans"][1])
    text = (place / MANIFEST).read_text()
    (place / MANIFEST).write_text(text.replace('"steps": 3', '"steps": 4'))
    with pytest.raises(BundleError, match=r"manifest.json was changed after it was written"):
        Bundle.open(place)


def test_graphs_that_are_not_there_or_have_other_ports(pristine, place):
    lay(place, pristine["network"][1])
    bundle = Bundle.open(place)
    with pytest.raises(BundleError, match=r"x.bundle has no graph 'cnn'; it has refine_step"):
        bundle.graph("cnn")
    inputs, outputs = ports(bundle.graph("prior"))
    for wrong in ([], [inputs[0]._replace(name="x")], [inputs[0]._replace(dtype="tensor(int8)")],
                  [inputs[0]._replace(shape=(1, 3, 24, 33))], inputs * 2):  # fmt: skip
        with pytest.raises(BundleError, match=r"graph 'prior' has inputs .* the manifest says"):
            bundle.check_ports("prior", wrong, outputs)
    with pytest.raises(BundleError, match=r"graph 'prior' has outputs .* the manifest says"):
        bundle.check_ports("prior", inputs, inputs)


# Paths

PATHS = ["../outside/secret.bin", "/etc/hostname", "a\\b", "..\\outside\\secret.bin", ".", "..", "",
         "/", "./prior.onnx", "engines/../prior.onnx", "engines//x", "engines/", "a/b/c", "\0",
         "x\0.onnx", "x" * 101, "x" * 100_000, "é.onnx", "\u202eonnx.x", "-x", " x", "x ", "x\n",
         ".hidden", "C:\\x", "C:/x", "file:///etc/hostname", "~/x", "$HOME/x", "%2e%2e/x", MANIFEST,
         "MANIFEST.JSON/../manifest.json", None, 5, ["x"], {"file": "x"}]  # fmt: skip


@pytest.mark.parametrize("where", ENTRIES)
def test_36_paths_each(pristine, place, where):
    original, files = pristine["network"]
    data = (place.parent / "outside/secret.bin").read_bytes()
    for path in PATHS:
        manifest = copy.deepcopy(original)
        at(manifest, where).update(file_entry("x", data) | {"file": path})  # only the path is wrong
        lay(place, files | {MANIFEST: seal_bytes(manifest)})
        assert attempt(place, f"{where} {str(path)[:60]!r}") is None


def test_a_path_of_100_characters_in_a_folder_is_fine(pristine, place):
    manifest, files = copy.deepcopy(pristine["kmeans"])
    del files[MANIFEST]
    long = f"{'d' * 100}/{'f' * 100}"
    files[long] = files.pop("init.safetensors")
    manifest["init"]["file"] = long
    write_bundle(place, manifest, files)
    assert long in attempt(place, "long")[1]


# What a file can be


def _hide(target):
    """Move the true file out of the bundle, so that following a link would work."""
    true = target.parents[2 if target.parent.suffix != ".bundle" else 1] / "outside/true"
    shutil.move(target, true)
    return true


def _grow(target):
    with target.open("ab") as file:
        file.write(b"x")


KINDS = {
    "missing": lambda t: t.unlink(),
    "link": lambda t: t.symlink_to(_hide(t)),
    "hard link of another size": lambda t: (_hide(t), os.link(t.parent / "../pad", t)),
    "dangling": lambda t: (t.unlink(), t.symlink_to("nowhere")),
    "loop": lambda t: (t.unlink(), t.symlink_to(t.name)),
    "passwd": lambda t: (t.unlink(), t.symlink_to("/etc/passwd")),
    "self": lambda t: (t.unlink(), t.symlink_to("/proc/self/mem")),
    "fifo": lambda t: (t.unlink(), os.mkfifo(t)),
    "folder": lambda t: (t.unlink(), t.mkdir()),
    "empty": lambda t: t.write_bytes(b""),
    "longer": _grow,
    "sparse": lambda t: os.truncate(t, 2**40),
    "device": lambda t: (t.unlink(), os.mknod(t, 0o20666, os.makedev(1, 5))),  # /dev/zero
}


@pytest.mark.parametrize("kind", KINDS)
def test_things_in_place_of_each_file(pristine, place, kind):
    _, files = pristine["network"]
    for file in files:
        lay(place, files)
        (place / "pad").write_bytes(b"pad")
        (place.parent / "pad").write_bytes(b"pad")
        try:
            KINDS[kind](place / file)
        except OSError as error:
            pytest.skip(f"this user cannot make a {kind} here: {error}")
        assert attempt(place, f"{kind} {file}") is None
        (place.parent / "outside/true").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["link", "dangling", "loop", "fifo", "file", "missing"])
@pytest.mark.parametrize("inner", ["engines", "golden"])
def test_things_in_place_of_a_folder(pristine, place, kind, inner):
    lay(place, pristine["network"][1])
    true = place.parent / "outside/true"
    shutil.move(place / inner, true)
    target = {"link": true, "dangling": "nowhere", "loop": inner}.get(kind)
    if target:
        (place / inner).symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(place / inner)
    elif kind == "file":
        (place / inner).write_bytes(b"x")
    assert attempt(place, f"{kind} {inner}") is None
    with pytest.raises(BundleError, match=f"x.bundle/{inner}/.* (is missing|cannot be read: )"):
        read_all(place)


def test_what_each_kind_is_called(pristine, place):
    def refused(match):
        with pytest.raises(BundleError, match=match):
            read_all(place)
        lay(place, pristine["kmeans"][1])

    lay(place, pristine["kmeans"][1])
    init = place / "init.safetensors"
    KINDS["fifo"](init)
    refused(r"^x.bundle/init.safetensors is no regular file\n  fix: ")
    KINDS["longer"](init)
    refused(r"^x.bundle/init.safetensors has \d+ bytes; the manifest says \d+\n  fix: ")
    KINDS["missing"](init)
    refused(r"^x.bundle/init.safetensors is missing\n  fix: ")
    KINDS["link"](init)
    refused(r"^x.bundle/init.safetensors cannot be read: .*\(links are not followed\)\n  fix: ")
    (place / MANIFEST).unlink()
    refused(r"x.bundle is no bundle: it has no manifest.json\n  fix: ")
    os.truncate(place / MANIFEST, 2**40)
    refused(r"^x.bundle/manifest.json has 1099511627776 bytes; at most 4194304\n  fix: ")


def test_a_file_that_grows_while_it_is_read(pristine, place, monkeypatch):
    lay(place, pristine["kmeans"][1])
    stat, size = os.fstat, (place / "init.safetensors").stat().st_size

    def grow(descriptor):
        info = stat(descriptor)
        if info.st_size == size:
            _grow(place / "init.safetensors")
        return info

    monkeypatch.setattr(module.os, "fstat", grow)
    with pytest.raises(BundleError, match=r"init.safetensors has sha256"):
        read_all(place)


def test_files_of_equal_size_that_were_swapped(pristine, place):
    manifest, files = copy.deepcopy(pristine["kmeans"])
    del files[MANIFEST]
    for key, fill in (("1" * 16, b"1"), ("2" * 16, b"2")):
        entry, files[f"engines/{key}.engine"] = tiny_engine(key, fill * 100)
        manifest["engines"].append(entry)
    write_bundle(place, manifest, files)
    one, two = (place / f"engines/{key * 16}.engine" for key in "12")
    one.rename(place / "x")
    two.rename(one)
    (place / "x").rename(two)
    with pytest.raises(BundleError, match=r"engines/1111111111111111.engine has sha256"):
        read_all(place)


def test_extra_files_are_let_be(pristine, place):
    lay(place, pristine["kmeans"][1])
    (place / "notes.txt").write_text("mine")
    os.mkfifo(place / "pipe")
    assert attempt(place, "extra") is not None


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
@pytest.mark.parametrize("file", [MANIFEST, "init.safetensors", "."])
def test_a_file_that_may_not_be_read(pristine, place, file):
    lay(place, pristine["kmeans"][1])
    (place / file).chmod(0)
    try:
        with pytest.raises(BundleError, match="cannot be read: Permission denied"):
            read_all(place)
    finally:
        (place / file).chmod(0o700)


def test_what_is_no_folder(pristine, place):
    with pytest.raises(InputError, match=r"x.bundle is no folder; a bundle is one\n  fix: seen fr"):
        Bundle.open(place)
    for data in (b"PK\3\4 zip", b""):
        place.write_bytes(data)
        with pytest.raises(InputError, match=r"is no folder; a bundle is one\n  fix: unpack it"):
            Bundle.open(place)
    for name in ("x" * 300, "x" * 5000, "a\0b", "/dev/null", f"{place}/inside"):
        with pytest.raises(InputError, match="is no folder"):
            Bundle.open(name)
    place.unlink()
    place.symlink_to(place.name)
    with pytest.raises(InputError, match="is no folder"):
        Bundle.open(place)
    place.unlink()
    place.mkdir()
    with pytest.raises(
        BundleError, match=r"x.bundle is no bundle: it has no manifest.json\n  fix: "
    ):
        Bundle.open(place)


def test_a_folder_that_vanishes(place):
    with pytest.raises(BundleError, match=r"x.bundle/manifest.json is missing\n  fix: "):
        module._read(place, MANIFEST, None)


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


@pytest.mark.parametrize("where", ["init", "golden.0", "engines.0", "licence"])
def test_120_damaged_files_with_fitting_hashes(pristine, place, where):
    manifest, files = pristine["network"]
    for seed in range(120):
        data = damage(random.Random(seed), files[at(manifest, where)["file"]])
        put(place, pristine, where, data)
        result = attempt(place, f"{where} seed {seed}", everything)
        if result is not None:
            assert result[1][at(manifest, where)["file"]] == data, seed


def header(text, payload=b"", size=None):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + payload


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        header({}, size=2**63),
        header({}, size=2**64 - 1),
        header({}, size=100_000_001),
        header(b"not json"),
        header(b'{"a":' * 10_000),
        header({"a": tensor()}),  # no data
        header({"a": tensor(shape=(2**62,))}, bytes(4)),
        header({"a": tensor(shape=(2**32, 2**32))}, bytes(4)),
        header({"a": tensor(shape=(-1,))}, bytes(4)),
        header({"a": tensor(offsets=(4, 0))}, bytes(4)),
        header({"a": tensor(offsets=(0, 2**63))}, bytes(4)),
        header({"a": tensor(), "b": tensor()}, bytes(4)),  # overlapping
        header({"a": tensor(), "b": tensor(offsets=(2, 6))}, bytes(6)),
        header({"a": tensor(offsets=(4, 8))}, bytes(8)),  # a hole
        header({"a": tensor("F64")}, bytes(4)),
        header({"a": tensor("F99")}, bytes(4)),
        header({"a": tensor(5)}, bytes(4)),
        header({"a": tensor()}, bytes(5)),
        header({"a": 5}),
        header([]),
        header({"a": tensor("BF16", (2,))}, bytes(4)),
        header({"a": tensor("F8_E4M3", (4,))}, bytes(4)),
        header({"a": tensor("F8_E5M2", (4,))}, bytes(4)),
        header({"a": tensor("F8_E8M0", (4,))}, bytes(4)),
        header({"a": tensor("F4", (8,))}, bytes(4)),
        header({"a": tensor("C64", (1,), (0, 8))}, bytes(8)),
        header({"a": tensor("F32", (0, 2**62), (0, 0))}),
        header({"a": tensor("F32", (1,) * 100)}, bytes(4)),
        header({"__metadata__": 5}),
        header({"": tensor()}, bytes(4)),
        header({f"t{i}": tensor(shape=(0,), offsets=(0, 0)) for i in range(5000)}),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
               b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    ],
    ids=range(33),
)  # fmt: skip
@pytest.mark.parametrize("where", ["init", "golden.0"])
def test_hostile_safetensors(pristine, place, where, data):
    put(place, pristine, where, data)
    result = attempt(place, f"{where} {data[:80]!r}", everything)
    assert result is None or where == "init"
    try:
        arrays = load_tensors(data, "x.safetensors")
    except BundleError as error:
        assert str(error).startswith("x.safetensors is no safetensors file: ")
    else:
        assert all(type(a) is np.ndarray and a.flags.owndata for a in arrays.values())


@pytest.mark.parametrize("name", ["safetensors", "safetensors.numpy"])
def test_tensors_without_safetensors(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingBackend, match=r"(?s)needed to read x, but .*pip install safetensors"
    ):
        load_tensors(b"", "x")


@pytest.mark.parametrize(
    "location",
    ["../outside/secret.bin", "/etc/passwd", "weight.bin", "..\\outside\\secret.bin", "", "x\0y"],
)
@pytest.mark.parametrize("graph", ["prior", "refine_step"])
def test_weights_outside_of_a_graph(pristine, place, graph, location):
    model = onnx.load_from_string(pristine["network"][1][f"{graph}.onnx"])
    first = model.graph.initializer[0]
    first.ClearField("raw_data")
    first.data_location = onnx.TensorProto.EXTERNAL
    first.external_data.add(key="location", value=location)
    put(place, pristine, f"graphs.{graph}", model.SerializeToString())
    (place / "weight.bin").write_bytes(bytes(1000))  # even where it is there
    assert attempt(place, location) is None
    with pytest.raises(
        BundleError, match=rf"(?s)x.bundle/{graph}.onnx keeps weights in .*not load"
    ):
        Bundle.open(place).graph(graph)


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


def test_500_damaged_graphs_with_fitting_hashes(tmp_path):
    """In one process of their own, so that a crash inside ONNX Runtime is seen and named."""
    command = "from tests.test_bundle import graph_cases; from pathlib import Path; import sys; "
    command += "graph_cases(Path(sys.argv[1]), 500)"
    done = subprocess.run(
        [sys.executable, "-c", command, tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34)),
    )
    lines = done.stdout.splitlines()
    last = next((line for line in reversed(lines) if line.startswith("case")), "before any case")
    assert done.returncode == 0, f"{last}: code {done.returncode}\n{done.stderr[-3000:]}"
    assert lines.count("refused") + lines.count("loads") == 500
    assert lines.count("refused") > 100 and lines.count("loads") > 5


def test_the_golden_of_a_bundle_that_was_tampered_with_is_refused(pristine, place):
    arrays = load_tensors(pristine["network"][1]["golden/000.safetensors"], "golden")
    put(place, pristine, "golden.0", tensors(arrays | {"labels": arrays["labels"][::-1]}))
    assert attempt(place, "golden", run_golden) is None
