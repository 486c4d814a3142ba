"""runtime/bundle against damaged and rewritten manifests and files: some 2,000 of them.

Every case ends in one BundleError with one fix line, quickly, with nothing written outside; or,
where what the bundle says is the same or was sealed again, in that manifest and the same bytes.
"""

import copy
import functools
import random

import pytest
from cases import case
from hostile_bundles import NAMES, at, attempt, damage, run_golden, seal_bytes

from runtime.bundle import manifest as forms
from runtime.bundle.manifest import MANIFEST, seal
from runtime.bundle.read import Bundle
from runtime.errors import BundleError

onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")
from bundles import lay, ports, read_all  # noqa: E402 (after importorskip)


@pytest.mark.parametrize("name", NAMES)
def test_the_bundles_that_are_mutated_load(pristine, place, name):
    manifest, files = pristine[name]
    lay(place, files)
    loaded, data = attempt(place, name)
    assert loaded == manifest and data == {k: v for k, v in files.items() if k != MANIFEST}
    run_golden(place)
    bundle = Bundle.open(place)
    assert bundle.name == "x.bundle" and bundle.names == manifest["classes"]


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
            assert result[0] == manifest and forms._canonical(result[0]) == forms._canonical(
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


NONE = [
    ("", "cannot be read: Expecting value"),
    ("null", "has schema of type NoneType"),
    ("[]", "has schema of type NoneType"),
    ('"dg-bundle/1"', "has schema of type NoneType"),
    ('{"schema": "dg-bundle/2"}', "has schema 'dg-bundle/2'; this version reads 'dg-bundle/1'"),
    ('{"schema": [[1]]}', "has schema of type list"),
    ('{"schema": "dg-bundle/1"}', r"manifest lacks \['classes', 'created'"),
    (
        '{"schema": "dg-bundle/1", "schema": "dg-bundle/1"}',
        "cannot be read: a key occurs twice among",
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
]


def test_manifests_that_are_none(pristine, place):
    for text, match in NONE:
        with case(match):
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


WRONG = [
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
    ("refine.lr", "A" * 10**6, "refine: lr is 'A{70}.*[.]{3}"),
    ("classes", ["\ud800"], "surrogates not allowed"),
    ("classes", ["\x1b]0;owned\x07"], r"manifest.classes\[0\] is"),
    ("name", "a/b", "manifest.name is 'a/b'"),
    ("recipe", DEEP, "manifest.recipe is"),
    ("recipe", {"x": DEEP}, "lists and objects are nested more than 20 deep"),
]


def test_what_the_manifest_may_not_say(pristine, place):
    for where, value, match in WRONG:
        with case(where, match):
            change(pristine, place, where, value)
            assert attempt(place, match) is None
            with pytest.raises(BundleError, match=f"(?s){match}"):
                read_all(place)


def test_nested_manifests(pristine, place):
    for depth in [15, 16, 300, 700, 900, *range(940, 1000, 4), 1500, 50_000]:
        with case(depth):
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
