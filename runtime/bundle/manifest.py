"""The manifest: its form, its seal, how it is made and how it is parsed.

``_SPEC`` describes the form, and ``make_manifest`` makes a manifest: add a new field in these two
places. The file ``docs/dg-bundle-1.schema.json`` publishes the form as a JSON Schema. Write it with

    python -c "import runtime.bundle.manifest as m; print(m.schema_text())" > FILE
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from runtime.checks import is_count, is_number
from runtime.core.config import RefineConfig
from runtime.engines.port import Port
from runtime.errors import BundleError, SdkError
from runtime.prior.preprocess import Preprocess

SCHEMA = "dg-bundle/1"
MANIFEST = "manifest.json"
MANIFEST_BYTES = 2**22  # most bytes of the manifest
FILE_BYTES = 2**31 - 1  # most bytes of each other file
DEPTH = 20  # most levels of lists and objects in the manifest
GRAPHS = ("prior", "refine_step", "refine_map", "cnn")


def ports_entry(ports: list[Port]) -> list[dict[str, Any]]:
    """Ports as the manifest stores them; see :meth:`runtime.engines.port.Port.entry`."""
    return [port.entry() for port in ports]


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the sha256 of its other fields, by which a later change is detected.

    Raises
    ------
    ValueError : a value that JSON does not have, such as NaN.
    """
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return body | {"sha256": hashlib.sha256(_canonical(body)).hexdigest()}


def parse_manifest(data: bytes, name: str) -> dict[str, Any]:
    """Parse a manifest, and check the form of all its fields.

    Parameters
    ----------
    data : the bytes of the file.
    name : of the file, for messages.

    Raises
    ------
    BundleError : the bytes are no manifest, the schema or form is another one, or the manifest was
        changed after it was sealed.
    """
    if len(data) > MANIFEST_BYTES:
        raise BundleError(f"{name} has {len(data)} bytes; at most {MANIFEST_BYTES}")
    try:
        manifest = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name} cannot be read: {short(error)}") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        came = repr(schema[:80]) if isinstance(schema, str) else f"of type {type(schema).__name__}"
        raise BundleError(
            f"{name} has schema {came}; this version reads {SCHEMA!r}",
            fix="export the bundle again with this version, or update the SDK",
        )
    try:
        _check_depth(manifest)
        _check(manifest, _SPEC, "manifest")
        sealed = seal(manifest)["sha256"]
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}: {short(error)}") from error
    if sealed != manifest["sha256"]:
        raise BundleError(f"{name} was changed after it was written")
    files = [entry["file"] for entry in entries(manifest)]
    if len({*files, MANIFEST}) < len(files) + 1:
        raise BundleError(f"{name} lists a file twice, or itself")
    if manifest["preprocess"] is not None:
        Preprocess.from_manifest(manifest["preprocess"])
    kind = manifest["prior"]["kind"]
    if (kind == "network") != ("prior" in manifest["graphs"]) or (
        (kind == "network") != (manifest["preprocess"] is not None)
    ):
        raise BundleError(f"{name}: prior, graphs and preprocess do not fit together")
    if "refinement" in manifest["model"] and "cnn" not in manifest["graphs"]:
        raise BundleError(f"{name}: the refinement was trained, and the graph cnn is missing")
    try:
        RefineConfig(**manifest["refine"])
    except (SdkError, TypeError, OverflowError) as error:
        raise BundleError(f"{name}: refine: {short(error)}") from error
    for engine in manifest["engines"]:
        if engine["graph"] not in manifest["graphs"]:
            raise BundleError(f"{name}: engine for an unknown graph {engine['graph']!r}")
    return manifest


def _canonical(body: Mapping[str, Any]) -> bytes:
    """The manifest as bytes for its hash: JSON in UTF-8, keys sorted, without white space.
    ValueError for half a surrogate pair, which UTF-8 does not have."""
    text = json.dumps(
        body, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )
    return text.encode()


def short(error: Exception) -> str:
    """The message of an error without its fix, at most 300 characters: a message quotes the
    manifest, whose author may be hostile."""
    text = error.message if isinstance(error, SdkError) else str(error)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON as a dict. ValueError if two of its keys are equal."""
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError(f"a key occurs twice among {sorted(key for key, _ in pairs)[:8]}")
    return out


def _no_constant(text: str) -> float:
    """ValueError for NaN and Infinity, which Python's parser would accept."""
    raise ValueError(f"{text} is no JSON number")


def entries(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entry of every file that the manifest lists."""
    return [
        *manifest["graphs"].values(),
        manifest["init"],
        *manifest["engines"],
        *manifest["golden"],
        manifest["licence"],
    ]


def _check_depth(value: Any) -> None:
    """ValueError when lists and objects are nested too deeply to be printed or copied."""
    level = [value]
    for _ in range(DEPTH):
        nested = [v for v in level if isinstance(v, (dict, list))]
        level = [v for box in nested for v in (box.values() if isinstance(box, dict) else box)]
    if level:
        raise ValueError(f"lists and objects are nested more than {DEPTH} deep")


class _Text(NamedTuple):
    """A string that matches a pattern, which means the same in Python and in ECMAScript."""

    pattern: str


class _Count(NamedTuple):
    """A whole number in a range."""

    low: int
    high: int


class _Number(NamedTuple):
    """A number in a range."""

    low: float
    high: float


_PATH = _Text(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,99})?")
# Tabs and line breaks are the only control characters that a text may have.
_ANY = _Text(r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]{0,100000}")
_FILE = {"file": _PATH, "sha256": _Text("[0-9a-f]{64}"), "size": _Count(1, FILE_BYTES)}
_SHAPE = [(_Count(-1, 2**31), _Text(r"[^\n]{1,100}"))]
_PORT = {"name": _Text(r"[^\n]{1,200}"), "dtype": _Text("[a-z0-9]{1,20}"), "shape": _SHAPE}
_PORTS = [_PORT]
_GRAPH = _FILE | {
    "opset": _Count(1, 1000),
    "precision": _Text("fp32|fp16|int8|int8[+]fp16"),
    "inputs": _PORTS,
    "outputs": _PORTS,
    "kept_fp32": [_ANY],
}
_ENGINE = _FILE | {
    "key": _Text("[0-9a-f]{16}"),
    "graph": _Text("|".join(GRAPHS)),
    "runtime": _Text("tensorrt|tensorrt_rtx"),
    "version": _Text(r"[0-9]{1,5}([.][0-9]{1,5}){1,3}"),
    "compute_capabilities": [_Text("[0-9]{1,2}[.][0-9]")],
    "gpu_name": (_ANY, None),
    "l4t": (_ANY, None),
    "platform": _ANY,
    "shapes": dict,
    "flags": dict,
    "receipt": dict,
    "seconds": _Number(0, 10**6),
    "inputs": _PORTS,
    "outputs": _PORTS,
}
_PRIOR_NETWORK = {"kind": _Text("network"), "output": _Text("logits|probabilities|labels")}
_PRIOR_KMEANS = {
    "kind": _Text("kmeans"),
    "clusters": _Count(1, 256),
    "temperature": _Number(1e-3, 1e3),
}
_NAME = _Text(r"[^/\x00-\x1f\x7f-\x9f]{1,200}")
_RUN = {  # what all methods of the trainer store
    "step": _Count(0, 10**9),
    "steps": _Count(1, 10**9),
    "settings": dict,
    "pictures": _Count(1, 2**53),
    "seed": _Count(0, 2**53),
}
_HEAD = {  # what those store that train a head on a backbone
    **_RUN,
    "select": _Text("last|energy|labels"),
    "backbone": {
        "name": _ANY,
        "source": _NAME,  # without the folders above it
        "features": _ANY,
        "sha256": _Text("[0-9a-f]{64}"),
        "channels": _Count(1, 2**16),
        "stride": _Count(1, 1024),
        "mean": [_Number(-1e3, 1e3)],
        "std": [_Number(-1e3, 1e3)],
        "padding": _ANY,
        "licence": _ANY,
        "trained": bool,
    },
    "views": {"size": _Count(1, 2**15), "crops?": _Text("[a-z]{1,40}")},  # crops: of segunify
    "flip": bool,
}
_SEGUNIFY = {
    "method": _Text("segunify"),
    **_HEAD,
    "labels_used": [_Text("names|selection")],  # empty if no label was used at all
    "names": (
        {
            "labels": _NAME,  # the folder of the labels
            "pictures": _Count(1, 2**53),
            "trained_on": bool,  # whether the head was trained on these pictures
            "accuracy": _Number(0, 1),
            "miou": _Number(0, 1),
        },
        None,
    ),
}
_BOOSTING = {
    "method": _Text("boosting"),
    **_HEAD,
    "select": _Text("last|energy"),
    "labels_used": [_Text("selection")],
    "mask": _Text("fine|coarse"),
}
_REFINE = {  # of a refinement network
    "method": _Text("refine"),
    **_RUN,
    "select": _Text("last|energy|cold"),
    "labels_used": [_Text("training")],
    "prior": {
        "kind": _Text("onnx|bundle"),
        "name": _NAME,  # of the file or folder, without the folders above it
        "sha256": _Text("[0-9a-f]{64}"),
        "classes": _Count(1, 4096),
    },
}
_SPEC: dict[str, Any] = {
    "schema": _Text(SCHEMA),  # it has no character with a meaning in a pattern
    "name": _NAME,
    "created": _Text(r"[0-9TZ:.+-]{1,40}"),
    "sdk": _Text(r"[0-9A-Za-z.+-]{1,40}"),
    "prior": (_PRIOR_NETWORK, _PRIOR_KMEANS),
    # "training" is that of the prior, "refinement" that of the weights in cnn.onnx.
    "model": {
        "name": _ANY,
        "trained": bool,
        "training?": (_SEGUNIFY, _BOOSTING),
        "refinement?": _REFINE,
    },
    "preprocess": (dict, None),
    "classes": ([_ANY], None),
    "graphs": {f"{name}?": _GRAPH for name in GRAPHS},
    "refine": dict,
    "init": _FILE,
    "engines": [_ENGINE],
    "golden": [_FILE | {"steps": _Count(0, 100)}],
    "verification": dict,
    "recipe": dict,
    "licence": _FILE | {"text": _ANY},
    "sha256": _Text("[0-9a-f]{64}"),
}


def _check(value: Any, spec: Any, where: str) -> None:
    """ValueError unless ``value`` has the form of ``spec``. ``where`` says in the message which
    value it is."""
    if isinstance(spec, _Text):
        fits = isinstance(value, str) and re.fullmatch(spec.pattern, value) is not None
    elif isinstance(spec, _Count):
        fits = is_count(value, spec.low, spec.high)
    elif isinstance(spec, _Number):
        fits = is_number(value, spec.low, spec.high)
    elif isinstance(spec, tuple):  # any one of these forms
        problems = []
        for choice in sorted(spec, key=lambda choice: not _is_kind(value, choice)):
            try:
                return _check(value, choice, where)
            except ValueError as error:
                problems.append(str(error))
        raise ValueError(problems[0])
    elif isinstance(spec, list):
        fits = isinstance(value, list)
        for i, item in enumerate(value if fits else ()):
            _check(item, spec[0], f"{where}[{i}]")
    elif isinstance(spec, dict):  # exactly these keys; "key?" may be missing
        fits = isinstance(value, dict)
        if fits:
            keys = {key.removesuffix("?"): item for key, item in spec.items()}
            missing = sorted(k for k in spec if not k.endswith("?") and k not in value)
            if missing or not set(value) <= set(keys):
                unknown = sorted(set(value) - set(keys))
                raise ValueError(f"{where} lacks {missing} or has unknown {unknown}")
            for key, item in value.items():
                _check(item, keys[key], f"{where}.{key}")
    else:
        fits = value is None if spec is None else isinstance(value, spec)
    if not fits:
        raise ValueError(f"{where} is {str(value)[:80]!r}, which does not fit")


def _is_kind(value: Any, spec: Any) -> bool:
    """Whether the first field of an object, its kind or method, is that of ``spec``: if the object
    has another form, the message is about the fields of this kind."""
    if not isinstance(spec, dict) or not isinstance(value, dict):
        return False
    first, form = next(iter(spec.items()))
    return isinstance(form, _Text) and value.get(first) == form.pattern


# Making a manifest


def make_manifest(
    *,
    name: str,
    sdk: str,
    model: Mapping[str, Any],
    prior: Mapping[str, Any],
    preprocess: Preprocess | None,
    classes: Sequence[str] | None,
    graphs: Mapping[str, Mapping[str, Any]],
    refine: RefineConfig,
    init: Mapping[str, Any],
    golden: Sequence[Mapping[str, Any]],
    verification: Mapping[str, Any],
    recipe: Mapping[str, Any],
    licence: Mapping[str, Any],
    engines: Sequence[Mapping[str, Any]] = (),
    created: str | None = None,
) -> dict[str, Any]:
    """A manifest of the form that :func:`parse_manifest` checks, not sealed yet.

    Parameters
    ----------
    name : of the bundle.
    sdk : the version of this package.
    model : {"name", "trained"} of the prior's model; also {"training"} of a head and {"refinement"}
        of a refinement network that were trained by python -m export train, which
        :func:`export.models.trained.trained` returns.
    prior : from :func:`network_prior` or :func:`kmeans_prior`.
    preprocess : how a picture becomes the input of the prior's network; None without a network.
    classes : the names of the classes, in the order of their numbers; None where they have none.
    graphs : a :func:`graph_entry` for each name of GRAPHS that the bundle has.
    refine : the refinement that the graphs were exported with.
    init : :func:`file_entry` of init.safetensors.
    golden : :func:`golden_entry` of each golden file.
    verification : what the checks of the export measured.
    recipe : how the bundle was exported, and how its engines are built.
    licence : :func:`licence_entry` of the model's licence file.
    engines : entries of :mod:`runtime.bundle.engines`.
    created : UTC, as "2025-01-01T00:00:00Z"; the present time when None.
    """
    return {
        "schema": SCHEMA,
        "name": name,
        "created": created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sdk": sdk,
        "prior": dict(prior),
        "model": dict(model),
        "preprocess": None if preprocess is None else preprocess.to_manifest(),
        "classes": None if classes is None else list(classes),
        "graphs": {graph: dict(entry) for graph, entry in graphs.items()},
        "refine": asdict(refine) | {"offsets": list(refine.offsets)},
        "init": dict(init),
        "engines": [dict(entry) for entry in engines],
        "golden": [dict(entry) for entry in golden],
        "verification": dict(verification),
        "recipe": dict(recipe),
        "licence": dict(licence),
    }


def network_prior(output: str) -> dict[str, Any]:
    """The manifest's entry of a prior that is a network; ``output`` is "logits", "probabilities" or
    "labels"."""
    return {"kind": "network", "output": output}


def kmeans_prior(clusters: int, temperature: float) -> dict[str, Any]:
    """The manifest's entry of a prior that is k-means, with its number of clusters and its
    temperature."""
    return {"kind": "kmeans", "clusters": clusters, "temperature": temperature}


def file_entry(file: str, data: bytes) -> dict[str, Any]:
    """The manifest's entry of a file: its path inside the bundle, sha256 and size in bytes."""
    return {"file": file, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def graph_entry(
    file: str,
    data: bytes,
    *,
    opset: int,
    inputs: list[Port],
    outputs: list[Port],
    precision: str = "fp32",
    kept_fp32: Sequence[str] = (),
) -> dict[str, Any]:
    """The manifest's entry of an ONNX file.

    Parameters
    ----------
    file : its path inside the bundle.
    data : its bytes.
    opset : version of the ONNX operators.
    inputs, outputs : as the engine that loaded the graph lists them.
    precision : "fp32", "fp16", "int8" or "int8+fp16".
    kept_fp32 : the nodes that stay FP32 in a lower precision.
    """
    return file_entry(file, data) | {
        "opset": opset,
        "precision": precision,
        "inputs": ports_entry(inputs),
        "outputs": ports_entry(outputs),
        "kept_fp32": list(kept_fp32),
    }


def golden_entry(file: str, data: bytes, steps: int) -> dict[str, Any]:
    """The manifest's entry of a file of golden vectors; ``steps`` is their number of refinement
    steps."""
    return file_entry(file, data) | {"steps": steps}


def licence_entry(file: str, data: bytes, text: str) -> dict[str, Any]:
    """The manifest's entry of the model's licence file; ``text`` is the licence in words."""
    return file_entry(file, data) | {"text": text}


# The published form

_NAMED = {"port": _PORT, "graph": _GRAPH, "engine": _ENGINE}


def json_schema() -> dict[str, Any]:
    """The manifest's form as a JSON Schema (2020-12).

    Every manifest that :func:`parse_manifest` accepts is valid. The reverse is almost true: a
    schema cannot check the seal, files that are listed twice, or the contents of ``preprocess`` and
    ``refine``, and it accepts 3.0 for the whole number 3.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{SCHEMA.replace('/', ':')}",
        "title": f"manifest.json of a bundle, {SCHEMA}",
        "description": "Written by runtime/bundle/manifest.py; do not edit. sha256 is that of the "
        "other fields: JSON in UTF-8, keys sorted, no white space.",
        **_schema_of(_SPEC),
        "$defs": {name: _schema_of(spec, {}) for name, spec in _NAMED.items()},
    }


def _schema_of(spec: Any, named: Mapping[str, Any] = _NAMED) -> dict[str, Any]:
    """The JSON Schema for a spec of :func:`_check`. A spec in ``named`` becomes a reference by its
    name."""
    for name, one in named.items():
        if spec is one:
            return {"$ref": f"#/$defs/{name}"}
    if isinstance(spec, _Text):  # "$" would match before a last line break in Python
        return {"type": "string", "pattern": f"^(?:{spec.pattern})(?![\\s\\S])"}
    if isinstance(spec, (_Count, _Number)):
        kind = "integer" if isinstance(spec, _Count) else "number"
        return {"type": kind, "minimum": spec.low, "maximum": spec.high}
    if isinstance(spec, tuple):
        return {"anyOf": [_schema_of(choice) for choice in spec]}
    if isinstance(spec, list):
        return {"type": "array", "items": _schema_of(spec[0])}
    if isinstance(spec, dict):
        return {
            "type": "object",
            "properties": {key.removesuffix("?"): _schema_of(one) for key, one in spec.items()},
            "required": [key for key in spec if not key.endswith("?")],
            "additionalProperties": False,
        }
    return {"type": {bool: "boolean", dict: "object", None: "null"}[spec]}


def schema_text() -> str:
    """The text of ``docs/dg-bundle-1.schema.json``."""
    return json.dumps(json_schema(), indent=1)
