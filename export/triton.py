"""A Triton Inference Server model repository for a bundle's prior."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from runtime.bundle.read import Bundle
from runtime.bundle.write import check_writable, replaced_folder
from runtime.engines.port import triton_dtype
from runtime.errors import InputError
from runtime.files import real_path, shown, stat_of


def write_repository(folder: Path, bundle: Bundle) -> Path:
    """Write a model repository: FOLDER/NAME/config.pbtxt, and NAME/1/model.onnx, or
    NAME/1/model.plan when the bundle has a TensorRT engine of the prior.

    Triton runs the prior only: its clients receive the prior's output.

    Parameters
    ----------
    folder : the repository. An older model of the same name in it is replaced.
    bundle : the bundle.

    Returns
    -------
    The folder of the model, FOLDER/NAME.

    Raises
    ------
    InputError : the prior is no network, an input or output has a type that Triton lacks, or the
        folder cannot be written. Also what :func:`repository_place` raises.
    BundleError : the bundle is damaged.

    Example
    -------
    >>> write_repository(Path("models"), Bundle.open("city.bundle"))
    PosixPath('models/city')
    """
    graph = bundle.manifest["graphs"].get("prior")
    if graph is None:
        raise InputError(
            f"{bundle.name} has no network to serve", fix="export a network, or leave --triton out"
        )
    engine = next(
        (
            e
            for e in bundle.manifest["engines"]
            if e["graph"] == "prior" and e["runtime"] == "tensorrt"
        ),
        None,
    )
    place = repository_place(folder, bundle.manifest["name"], bundle.path)
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


def repository_place(folder: Path, bundle_name: str, bundle: Path) -> Path:
    """The folder for a bundle's model in a repository, which is checked: it can be written.

    Parameters
    ----------
    folder : the repository.
    bundle_name : "NAME.bundle".
    bundle : the bundle's folder; it may not exist yet.

    Raises
    ------
    InputError : the folder exists and is no Triton model, or cannot be written; the repository is a
        file, or lies in one; the repository and the bundle are the same folder, or one is inside
        the other; or the repository would be named "triton" in the current folder, where Python
        finds it instead of the package of that name.

    Example
    -------
    >>> repository_place(Path("models"), "city.bundle", Path("city.bundle"))
    PosixPath('models/city')
    """
    repository, own = Path(real_path(folder)), Path(real_path(bundle))
    if own in (repository, *repository.parents):
        raise InputError(
            f"the Triton repository {shown(folder)} would be in the bundle {shown(bundle)}, and "
            "the next export would remove it",
            fix="choose a folder outside of the bundle: --triton model_repository",
        )
    if repository in own.parents:
        raise InputError(
            f"the bundle {shown(bundle)} would be in the Triton repository {shown(folder)}, where "
            "Triton takes each folder for a model",
            fix="choose another: --triton model_repository",
        )
    if folder.name == "triton":
        around, here = stat_of(folder.parent), stat_of(".")
        if around and here and os.path.samestat(around, here):
            raise InputError(
                "a folder triton here would hide the Python package of that name from torch",
                fix="choose another: --triton model_repository",
            )
    for path in (folder, *folder.parents):
        found = stat_of(path)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            raise InputError(
                f"triton is {str(folder)!r}, and {path} is a file; wanted a folder",
                fix="choose another: --triton model_repository",
            )
    place = folder / Path(bundle_name).stem.replace(" ", "_")
    if stat_of(place) is not None and stat_of(place / "config.pbtxt") is None:
        raise InputError(
            f"{place} exists and is no Triton model; it is left alone", fix="choose another folder"
        )
    check_writable(place)
    return place


def _config(name: str, file: str, bundle: Bundle, plan: bool) -> str:
    """The text of config.pbtxt. Batching is off, so that dims are whole shapes."""
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
            try:
                dtype = triton_dtype(port["dtype"])
            except KeyError as error:
                raise InputError(
                    f"{kind} {port['name']} of {bundle.name} is {port['dtype']}, no type of Triton",
                    fix="export the network with another type, or leave --triton out",
                ) from error
            name = _quoted(port["name"])
            lines.append(f"{kind} [ {{ name: {name} data_type: {dtype} dims: [ {dims} ] }} ]")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """The text as a string of protobuf's text format, which escapes as JSON does."""
    return json.dumps(text, ensure_ascii=False)
