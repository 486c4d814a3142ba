"""A Triton Inference Server model repository for a bundle's prior."""

from __future__ import annotations

import json
from pathlib import Path

from runtime.bundle.read import Bundle
from runtime.engines.port import triton_dtype
from runtime.errors import InputError
from runtime.files import replaced_folder


def write_repository(folder: Path, bundle: Bundle) -> Path:
    """Write ``folder``/NAME/config.pbtxt and NAME/1/model.onnx, or model.plan when the bundle has a
    TensorRT engine of the prior. Returns ``folder``/NAME; one that is there is replaced.

    Triton cannot refine: its clients get the prior's output.

    Raises
    ------
    InputError : the prior is no network, or ``folder`` cannot be written.
    """
    graph = bundle.manifest["graphs"].get("prior")
    if graph is None:
        raise InputError(f"{bundle.name} has no network to serve")
    engine = next(
        (
            e
            for e in bundle.manifest["engines"]
            if e["graph"] == "prior" and e["runtime"] == "tensorrt"
        ),
        None,
    )
    place = repository_place(folder, bundle.manifest["name"])
    name = place.name
    file, data = "model.onnx", bundle.read(graph)
    if engine is not None:
        file, data = "model.plan", bundle.read(engine)
    config = _config(name, file, bundle, engine is not None)
    with replaced_folder(place) as partial:
        (partial / "1").mkdir()
        (partial / "1" / file).write_bytes(data)
        (partial / "config.pbtxt").write_text(config, encoding="utf-8")
    return place


def repository_place(folder: Path, bundle_name: str) -> Path:
    """Where the model of a bundle of that name goes; InputError when something else is there."""
    if folder.name == "triton" and folder.resolve().parent == Path.cwd():
        raise InputError(
            "a folder triton here would hide the Python package of that name from torch",
            fix="choose another: --triton model_repository",
        )
    place = folder / Path(bundle_name).stem.replace(" ", "_")
    if place.exists() and not (place / "config.pbtxt").is_file():
        raise InputError(
            f"{place} exists and is no Triton model; it is left alone", fix="choose another folder"
        )
    return place


def _config(name: str, file: str, bundle: Bundle, plan: bool) -> str:
    """config.pbtxt: batching off, so dims are whole shapes."""
    graph = bundle.manifest["graphs"]["prior"]
    lines = [
        f"name: {_quoted(name)}",
        f'platform: "{"tensorrt_plan" if plan else "onnxruntime_onnx"}"',
        f'default_model_filename: "{file}"',
        "max_batch_size: 0",
    ]
    for kind in ("input", "output"):
        for port in graph[f"{kind}s"]:
            dims = ", ".join(str(n if isinstance(n, int) else -1) for n in port["shape"])
            name, dtype = _quoted(port["name"]), triton_dtype(port["dtype"])
            lines.append(f"{kind} [ {{ name: {name} data_type: {dtype} dims: [ {dims} ] }} ]")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As a string of protobuf's text format, which escapes as JSON does."""
    return json.dumps(text, ensure_ascii=False)
