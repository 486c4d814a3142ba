"""The manifest's form: made, checked and published from one place."""

import copy
import json
from pathlib import Path

import pytest
from cases import case

from runtime.bundle import manifest as form
from runtime.bundle.manifest import make_manifest, parse_manifest, seal
from runtime.core.config import RefineConfig
from runtime.engines.port import Port
from runtime.errors import BundleError
from runtime.prior.preprocess import Preprocess

pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: pip install jsonschema")

from bundles import tiny_parts  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "docs/dg-bundle-1.schema.json"
OLD = ROOT / "tests/data/kmeans.bundle/manifest.json"  # which an earlier version wrote


@pytest.fixture(scope="module")
def schema():
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


@pytest.fixture(scope="module")
def manifests():
    """Sealed manifests: of this version, with a network and an engine, and of an earlier one."""
    kinds = {"tiny": False, "tiny network": True}
    made = {name: seal(tiny_parts(with_network=kind)[0]) for name, kind in kinds.items()}
    return {name: json.loads(json.dumps(m)) for name, m in made.items()} | {
        "old": json.loads(OLD.read_text())
    }


def parse(manifest):
    return parse_manifest(json.dumps(manifest).encode(), "x/manifest.json")


def test_the_published_schema_is_that_of_the_code(schema):
    assert SCHEMA.read_text() == form.schema_text() + "\n", (
        "write it again, as the head of runtime/bundle/manifest.py says"
    )
    jsonschema.Draft202012Validator.check_schema(schema.schema)
    assert set(schema.schema["$defs"]) == {"port", "graph", "engine"}


def test_good_manifests_are_valid(schema, manifests):
    for name, manifest in manifests.items():
        assert parse(manifest) == manifest, name
        schema.validate(manifest)


def test_the_exporters_manifests_are_valid(schema, tmp_path):
    pytest.importorskip("skimage", reason="the demo photo is scikit-image's")
    from export.models.load import load_model
    from export.pack import ExportOptions, export_bundle

    options = ExportOptions(
        refine=RefineConfig(channels=4, steps=1, scale=0.25), imgsz=(48, 64), command="x"
    )
    bundle = export_bundle(load_model("kmeans", None, None), tmp_path / "x.bundle", options).bundle
    schema.validate(json.loads((bundle.path / "manifest.json").read_text()))


def test_an_earlier_manifest_is_made_again_with_the_same_seal(manifests):
    old = manifests["old"]
    values = {key: value for key, value in old.items() if key not in ("schema", "sha256")}
    values["refine"] = RefineConfig(**values["refine"])
    assert seal(make_manifest(**values))["sha256"] == old["sha256"]


def test_a_networks_preprocessing_is_made_again(manifests):
    new = manifests["tiny network"]
    values = {key: value for key, value in new.items() if key not in ("schema", "sha256")}
    values["refine"] = RefineConfig(**values["refine"])
    values["preprocess"] = Preprocess.from_manifest(values["preprocess"])
    assert seal(make_manifest(**values))["sha256"] == new["sha256"]


def test_every_field_is_made(manifests):
    values = {key: value for key, value in manifests["old"].items() if key != "sha256"}
    made = make_manifest(
        **{k: v for k, v in values.items() if k not in ("schema", "refine")}, refine=RefineConfig()
    )
    assert {*made, "sha256"} == set(form.json_schema()["required"])


def test_every_value_is_kept(manifests):
    """None of them is empty, so that one which is left out shows."""
    new = manifests["tiny network"] | {"classes": ["road", "pole"]}
    values = {key: value for key, value in new.items() if key not in ("schema", "sha256")}
    assert values.pop("engines") and values["golden"] and values["graphs"] and values["recipe"]
    given = values | {
        "engines": new["engines"],
        "refine": RefineConfig(**values["refine"]),
        "preprocess": Preprocess.from_manifest(values["preprocess"]),
    }
    made = json.loads(json.dumps(make_manifest(**given)))
    assert {key: made[key] for key in values} == values and made["engines"] == new["engines"]


def test_a_graphs_entry_names_what_stays_fp32():
    ports = [Port("x", (1, None), "tensor(float)")]
    entry = form.graph_entry(
        "prior.onnx",
        b"abc",
        opset=17,
        inputs=ports,
        outputs=ports,
        precision="fp16",
        kept_fp32=("Softmax_1",),
    )
    assert entry["kept_fp32"] == ["Softmax_1"] and entry["precision"] == "fp16"
    assert entry["inputs"] == [{"name": "x", "dtype": "float32", "shape": [1, -1]}]


def test_a_manifest_is_dated_when_it_is_made(manifests):
    values = {k: v for k, v in manifests["old"].items() if k not in ("schema", "sha256", "created")}
    made = make_manifest(**values | {"refine": RefineConfig()})
    assert parse(seal(json.loads(json.dumps(made))))["created"] == made["created"]


DROP = object()
MUTATIONS = [
    ("schema", "dg-bundle/2"),
    ("schema", DROP),
    ("name", ""),
    ("name", "a/b"),
    ("name", "line\n"),
    ("created", "yesterday"),
    ("sdk", 1),
    ("strange", 1),
    ("prior", None),
    ("prior.kind", "forest"),
    ("prior.strange", 1),
    ("model.trained", 1),
    ("preprocess", []),
    ("classes", "brick"),
    ("classes", [1]),
    ("classes", ["\x1b[2J"]),
    ("graphs.other", {}),
    ("graphs.refine_step.opset", 0),
    ("graphs.refine_step.opset", True),
    ("graphs.refine_step.opset", 18.5),
    ("graphs.refine_step.precision", "fp64"),
    ("graphs.refine_step.precision", "int8 fp16"),
    ("graphs.refine_step.file", "../x"),
    ("graphs.refine_step.file", "a/b/c"),
    ("graphs.refine_step.file", "x\n"),
    ("graphs.refine_step.size", 2**31),
    ("graphs.refine_step.inputs.0.name", "two\nlines"),
    ("graphs.refine_step.inputs.0.shape.0", -2),
    ("graphs.refine_step.inputs.0.shape.0", None),
    ("graphs.refine_step.inputs.0.dtype", "Float"),
    ("refine", []),
    ("init.sha256", "0" * 63),
    ("engines", {}),
    ("engines.0.key", "0123456789ABCDEF"),
    ("engines.0.seconds", -1),
    ("engines.0.seconds", "1"),
    ("engines.0.compute_capabilities", ["86"]),
    ("engines.0.gpu_name", 1),
    ("engines.0.inputs", [{}]),
    ("golden.0.steps", 101),
    ("verification", None),
    ("licence.text", DROP),
    ("sha256", None),
]


def test_what_is_refused_is_invalid(schema, manifests):
    for path, value in MUTATIONS:
        with case(path, value):
            wrong = copy.deepcopy(manifests["tiny network"])
            *folders, last = [int(word) if word.isdigit() else word for word in path.split(".")]
            place = wrong
            for word in folders:
                place = place[word]
            if value is DROP:
                del place[last]
            else:
                place[last] = value
            if path != "sha256":
                wrong = seal(wrong)  # so that it is not the seal that is refused
            with pytest.raises(BundleError):
                parse(wrong)
            assert not schema.is_valid(wrong)
