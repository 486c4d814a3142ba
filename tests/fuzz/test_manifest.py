"""Hostile manifests are refused in one sentence or are valid in every part."""

import contextlib
import io
import json
import os

import pytest
from fuzzing import CHANGES, DAMAGES, changed, damaged, inputs, limits, refusal, written
from hypothesis import given
from hypothesis import strategies as st

from runtime.__main__ import main
from runtime.bundle.manifest import MANIFEST, json_schema, make_manifest, parse_manifest, seal
from runtime.bundle.read import Bundle
from runtime.core.config import RefineConfig
from runtime.errors import BundleError
from runtime.prior.preprocess import Preprocess

pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")
jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: pip install jsonschema")

from bundles import tiny_bundle, tiny_parts  # noqa: E402

HOLE = "0" * 64  # where the seal is written
FREE = ["recipe", "verification", "refine", "preprocess", "shapes", "flags", "receipt", "classes"]
AROUND = ["{}", "\ufeff{}", "{}\r\n", "\n{}//", "[{}]", "{}{}", "{},"]


@pytest.fixture(scope="module")
def valid():
    """Two manifests: of k-means, and of a network with an engine."""
    parts = [tiny_parts(with_network=network)[0] for network in (False, True)]
    return [json.loads(json.dumps(seal(part))) for part in parts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle whose manifest the test replaces."""
    folder = tmp_path_factory.mktemp("fuzz") / "x.bundle"
    tiny_bundle(folder, with_network=True)
    return folder


@pytest.fixture(scope="module")
def schema():
    return jsonschema.Draft202012Validator(json_schema())


def sealed(text):
    """The text with the right seal, where a seal can be computed, so that the checks behind the
    seal are reached."""
    try:
        return text.replace(HOLE, seal(json.loads(text))["sha256"])
    except (ValueError, AttributeError, RecursionError):
        return text


def check(data, folder, schema):
    """Parse ``data``, and use what is accepted as the tools do."""
    with limits(seconds=1.0):
        manifest = refusal(lambda: parse_manifest(data, "x/manifest.json"), BundleError)
    if manifest is None:
        return
    assert parse_manifest(json.dumps(manifest).encode(), "again") == manifest
    schema.validate(manifest)
    bundle = Bundle(folder, manifest)
    refine, preprocess = bundle.refine(), bundle.preprocess()
    assert isinstance(refine, RefineConfig) and isinstance(preprocess, Preprocess | None)
    values = {key: value for key, value in manifest.items() if key not in ("schema", "sha256")}
    made = make_manifest(**values | {"refine": refine, "preprocess": preprocess})
    assert parse_manifest(json.dumps(seal(made)).encode(), "made again")
    (folder / MANIFEST).write_bytes(data)
    for words in (["inspect"], ["inspect", "--json"], ["build", "--dry-run"]):
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = main([*words, os.fspath(folder)])
        assert code in (0, 1, 4, 5), (words, code, errors.getvalue())
        if "--json" in words:
            json.loads(out.getvalue())


@inputs(400)
@given(which=st.booleans(), changes=CHANGES, around=st.sampled_from(AROUND[:1] * 9 + AROUND))
def test_changed_values(valid, folder, schema, which, changes, around):
    document = changed(valid[which] | {"sha256": HOLE}, changes)
    text = around.replace("{}", sealed(written(document)))
    check(text.encode(errors="surrogatepass"), folder, schema)


@inputs(400)
@given(part=st.sampled_from(FREE), changes=CHANGES)
def test_changed_values_of_one_part(valid, folder, schema, part, changes):
    """Most of these parts may contain anything, so that the tools read what is here."""
    document = json.loads(json.dumps(valid[1] | {"sha256": HOLE}))
    box = document["engines"][0] if part in document["engines"][0] else document
    box[part] = changed(box[part], changes)
    check(sealed(written(document)).encode(errors="surrogatepass"), folder, schema)


@inputs(150)
@given(which=st.booleans(), damages=DAMAGES, text=st.booleans())
def test_damaged_bytes(valid, folder, schema, which, damages, text):
    data = damaged(json.dumps(valid[which] | {"sha256": HOLE}, indent=1).encode(), damages)
    try:  # so that one changed letter reaches the checks behind the seal
        data = sealed(data.decode()).encode() if text else data
    except UnicodeDecodeError:
        pass
    check(data, folder, schema)
