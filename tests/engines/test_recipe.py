"""EngineRecipe: bundles store it, engines' keys depend on it, and neither changes by itself."""

import json
import shlex
import types
from dataclasses import replace

import pytest
from cases import case

from runtime.bundle import engines
from runtime.device.driver import CudaDevice
from runtime.engines.recipe import EngineRecipe
from runtime.errors import BundleError, InputError

GRAPHS = {"prior": b"prior", "refine_map": b"map"}
PICTURE = [[1, 3, 256, 256], [1, 3, 512, 512], [1, 3, 1024, 1024]]
FULL = {
    "compute_capabilities": ["8.6", "12.0"],
    "workspace": 2**31,
    "level": 3,
    "dynamic": True,
    "shapes": {"prior": {"image": PICTURE}, "refine_map": {}},
}
PLAIN = {
    "compute_capabilities": ["8.9"],
    "workspace": None,
    "level": None,
    "dynamic": False,
    "shapes": {"prior": {}, "refine_map": {}},
}
# Recorded from the program before EngineRecipe existed: engines in bundles have these keys.
KEYS = {
    ("rtx", "full"): ["73098073546bdbd9", "ad61297999596baa"],
    ("rtx", "plain"): ["7b123163f5a4fbc3", "a921ff13d928dc8d"],
    ("trt", "full"): ["e963629c5fa80186", "241b163619e1f656"],
    ("trt", "plain"): ["08bc942c15a0b263", "a94d615d31c573c8"],
}
ENTRY = (
    '{"key": "73098073546bdbd9", "graph": "prior", "file": "engines/73098073546bdbd9.engine", '
    '"runtime": "tensorrt_rtx", "version": "1.7.1.116", "compute_capabilities": ["8.6", "12.0"], '
    '"gpu_name": null, "l4t": null, "platform": "linux-x86_64", "shapes": {"image": '
    "[[1, 3, 256, 256], [1, 3, 512, 512], [1, 3, 1024, 1024]]}, "
    '"flags": {"workspace": 2147483648, "level": 3, "dynamic": true}}'
)


def manifest(recipe, **changes):
    told = {"command": "", "targets": ["rtx"], **recipe, **changes}
    return {"recipe": told, "graphs": GRAPHS}


def wanted(monkeypatch, target, recipe):
    """What has to be built, on a machine that is always the same."""
    on_orin = target == "trt"
    version = "10.3.0" if on_orin else "1.7.1.116"
    gpus = [CudaDevice(0, "Orin", "8.7", 2**33, 2**32)] if on_orin else []
    monkeypatch.setattr(
        engines, "load_tensorrt", lambda _: types.SimpleNamespace(__version__=version)
    )
    monkeypatch.setattr(engines, "cuda_devices", lambda: gpus)
    monkeypatch.setattr(engines, "l4t", lambda: "36.4")
    monkeypatch.setattr(engines, "platform_tag", lambda: "linux-x86_64")
    return engines.wanted_engines(EngineRecipe.from_manifest(manifest(recipe)), GRAPHS, target)


def test_keys_are_those_of_engines_that_exist(monkeypatch):
    for target, name in KEYS:
        with case(target, name):
            entries = wanted(monkeypatch, target, {"full": FULL, "plain": PLAIN}[name])
            assert [entry["key"] for entry in entries] == KEYS[target, name]
            if (target, name) == ("rtx", "full"):
                assert json.dumps(entries[0]) == ENTRY


def test_the_manifest_keeps_its_bytes():
    for recipe in [FULL, PLAIN]:
        with case(recipe):
            read = EngineRecipe.from_manifest(manifest(recipe))
            shapes = {graph: one.shapes_entry() for graph, one in read.items()}
            assert json.dumps(read["prior"].to_manifest(shapes)) == json.dumps(recipe)


def test_an_entry_gives_its_recipe_back(monkeypatch):
    recipes = EngineRecipe.from_manifest(manifest(FULL))
    for entry in wanted(monkeypatch, "rtx", FULL):
        assert EngineRecipe.from_entry(json.loads(json.dumps(entry))) == recipes[entry["graph"]]


def test_a_later_flag_is_stored_where_it_differs_from_its_default():
    """As tf32, which came after the first bundles: their keys must not change."""
    plain = EngineRecipe.from_manifest(manifest(PLAIN))["prior"]
    other = replace(plain, tf32=True)
    assert "tf32" not in plain.flags() and other.flags() == plain.flags() | {"tf32": True}
    facts = {"runtime": "tensorrt_rtx", "version": "1", "gpu_name": None, "l4t": None}
    assert plain.key(b"x", **facts) != other.key(b"x", **facts)
    stored = manifest(other.to_manifest(PLAIN["shapes"]))
    assert EngineRecipe.from_manifest(stored)["prior"] == other


TOO_LITTLE = [
    {"shapes": None},
    {"shapes": {"prior": {}}},
    {"shapes": {"prior": {"image": [[1, 2], [1, 2]]}, "refine_map": {}}},
    {"shapes": {"prior": {"image": [[1, 2], [1, 2], [1, 2, 3]]}, "refine_map": {}}},
    {"workspace": "2"},
    {"level": True},
    {"level": -1},
    {"dynamic": 1},
    {"tf32": 1},
    {"targets": "rtx"},
    {"compute_capabilities": [8.6]},
]


def test_a_recipe_that_says_too_little():
    for changes in TOO_LITTLE:
        with case(changes):
            with pytest.raises(
                BundleError, match=r"does not say how to build(.|\n)*export the bundle"
            ):
                EngineRecipe.from_manifest(manifest(PLAIN, **changes))


def test_a_flag_that_is_missing():
    old = manifest(PLAIN)
    del old["recipe"]["level"]
    with pytest.raises(BundleError, match="does not say how to build its engines"):
        EngineRecipe.from_manifest(old)


def test_numbers_have_ranges():
    with pytest.raises(InputError, match="level is 6; wanted 0 to 5"):
        EngineRecipe(level=6)
    with pytest.raises(InputError, match=r"workspace \(bytes\) is 4; wanted 1048576 to"):
        EngineRecipe(workspace=4)


def test_the_command_of_trtexec_builds_the_same_engine():
    """In the words that samples/common/sampleOptions.cpp of NVIDIA/TensorRT reads."""
    recipe = EngineRecipe.from_manifest(manifest(FULL))["prior"]
    assert recipe.trtexec("a b/prior.onnx", "prior.engine", "int8+fp16") == (
        "trtexec '--onnx=a b/prior.onnx' --saveEngine=prior.engine "
        "--minShapes=image:1x3x256x256 --optShapes=image:1x3x512x512 "
        "--maxShapes=image:1x3x1024x1024 --noTF32 --stronglyTyped "
        "--memPoolSize=workspace:2048 --builderOptimizationLevel=3"
    )
    plain = EngineRecipe(tf32=True).trtexec("m.onnx", "m.engine", "fp32")
    assert plain == "trtexec --onnx=m.onnx --saveEngine=m.engine"
    names = {"in:0": ((1, 3),) * 3, "a,b": ((9,),) * 3}
    words = shlex.split(EngineRecipe(shapes=names).trtexec("m.onnx", "m.engine", "fp16"))
    assert words[3:] == ["--optShapes='in:0':1x3,'a,b':9", "--noTF32", "--stronglyTyped"]
    names["in:0"] = ((1, 2), (1, 3), (1, 4))  # one of two inputs is free
    words = shlex.split(EngineRecipe(shapes=names).trtexec("m.onnx", "m.engine", "fp32"))
    assert words[3:6] == [
        f"--{end}Shapes='in:0':1x{n},'a,b':9" for n, end in ((2, "min"), (3, "opt"), (4, "max"))
    ]
