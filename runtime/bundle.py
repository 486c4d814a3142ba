"""The bundle: a folder with a manifest, ONNX files, initial weights, engines and golden vectors.

Reading trusts nothing: the manifest's form, every path, size and hash are checked, and the bytes
that were hashed are the bytes that are used. Hashes catch damage and mix-ups; whoever can rewrite a
bundle can rewrite its hashes, so an engine, which is native code, is as trustworthy as its origin.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.config import RefineConfig
from runtime.engine import Port, check_self_contained
from runtime.errors import BundleError, InputError, SdkError
from runtime.preprocess import Preprocess

SCHEMA = "dg-bundle/1"
MANIFEST = "manifest.json"
MANIFEST_BYTES = 2**22
FILE_BYTES = 2**31 - 1  # of one file
GRAPHS = ("prior", "refine_step", "refine_map", "cnn")
_AGAIN = "export the bundle again, or copy it again from where it works"


class Bundle(NamedTuple):
    """A bundle whose manifest has been checked; files are checked when they are read."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check the manifest.

        Raises
        ------
        InputError : no such folder.
        BundleError : no bundle, damaged, of another schema, or with paths that leave it.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder", fix=f"seen from {Path.cwd()}")
        data = _read(folder, MANIFEST, None)
        manifest = parse_manifest(data, f"{folder.name}/{MANIFEST}")
        return cls(folder, manifest)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def names(self) -> list[str] | None:
        """Class names, or None."""
        return self.manifest["classes"]

    def read(self, entry: Mapping[str, Any]) -> bytes:
        """The bytes of a file that the manifest lists, of the listed size and sha256."""
        data = _read(self.path, entry["file"], entry["size"])
        found = hashlib.sha256(data).hexdigest()
        if found != entry["sha256"]:
            raise BundleError(
                f"{self.name}/{entry['file']} has sha256 {found[:16]}..., "
                f"the manifest says {entry['sha256'][:16]}...",
                fix=_AGAIN,
            )
        return data

    def graph(self, name: str) -> bytes:
        """The ONNX bytes of a graph, without external data."""
        if name not in self.manifest["graphs"]:
            raise BundleError(
                f"{self.name} has no graph {name!r}; "
                f"it has {', '.join(self.manifest['graphs']) or 'none'}",
                fix=_AGAIN,
            )
        data = self.read(self.manifest["graphs"][name])
        check_self_contained(data, f"{self.name}/{name}.onnx")
        return data

    def check_ports(self, name: str, inputs: list[Port], outputs: list[Port]) -> None:
        """BundleError unless a loaded graph has the inputs and outputs that the manifest says."""
        entry = self.manifest["graphs"][name]
        for kind, ports in (("inputs", inputs), ("outputs", outputs)):
            if ports_entry(ports) != entry[kind]:
                raise BundleError(
                    f"{self.name}: graph {name!r} has {kind} {ports_entry(ports)}, "
                    f"the manifest says {entry[kind]}",
                    fix=_AGAIN,
                )

    def tensors(self, entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The arrays of a safetensors file."""
        return load_tensors(self.read(entry), f"{self.name}/{entry['file']}")

    def preprocess(self) -> Preprocess | None:
        """How the prior's network is fed; None without a network."""
        entry = self.manifest["preprocess"]
        return None if entry is None else Preprocess.from_manifest(entry)

    def refine(self) -> RefineConfig:
        """The refinement that the graphs were exported with."""
        return RefineConfig(**self.manifest["refine"])

    def check_files(self) -> None:
        """Read and check every file."""
        for entry in _entries(self.manifest):
            self.read(entry)


def load_tensors(data: bytes, name: str) -> dict[str, np.ndarray]:
    """Arrays of safetensors bytes; BundleError when they are none."""
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load
    except ImportError as error:
        from runtime.errors import MissingBackend

        raise MissingBackend(
            f"safetensors is needed to read {name}, but {error}", fix="pip install safetensors"
        ) from error
    try:
        arrays = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise BundleError(f"{name} is no safetensors file: {error}", fix=_AGAIN) from error
    return {key: np.array(value) for key, value in arrays.items()}


def ports_entry(ports: list[Port]) -> list[dict[str, Any]]:
    """Ports as the manifest writes them: dtype "float32", free dimensions by name or -1."""
    plain = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
    return [
        {
            "name": p.name,
            "dtype": plain.get(p.dtype, p.dtype.removeprefix("tensor(").removesuffix(")")),
            "shape": [-1 if n is None else n for n in p.shape],
        }
        for p in ports
    ]


# --- the manifest ------------------------------------------------------------------------------


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the sha256 of its own content, which catches a change by hand."""
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return body | {"sha256": hashlib.sha256(_canonical(body)).hexdigest()}


def parse_manifest(data: bytes, name: str) -> dict[str, Any]:
    """A manifest from its bytes, its form checked to the last key."""
    if len(data) > MANIFEST_BYTES:
        raise BundleError(f"{name} has {len(data)} bytes; at most {MANIFEST_BYTES}", fix=_AGAIN)
    try:
        manifest = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name} cannot be read: {error}", fix=_AGAIN) from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise BundleError(
            f"{name} has schema {schema!r}; this version reads {SCHEMA!r}",
            fix="export the bundle again with this version, or update the SDK",
        )
    try:
        _check(manifest, _SPEC, "manifest")
        sealed = seal(manifest)["sha256"]
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}: {error}", fix=_AGAIN) from error
    if sealed != manifest["sha256"]:
        raise BundleError(f"{name} was changed after it was written", fix=_AGAIN)
    files = [entry["file"] for entry in _entries(manifest)]
    if len(set(files)) < len(files):
        raise BundleError(f"{name} lists a file twice", fix=_AGAIN)
    if manifest["preprocess"] is not None:
        Preprocess.from_manifest(manifest["preprocess"])
    kind = manifest["prior"]["kind"]
    if (kind == "network") != ("prior" in manifest["graphs"]) or (
        (kind == "network") != (manifest["preprocess"] is not None)
    ):
        raise BundleError(f"{name}: prior, graphs and preprocess do not fit together", fix=_AGAIN)
    try:
        Bundle(Path(name), manifest).refine()
    except (SdkError, TypeError) as error:
        raise BundleError(f"{name}: refine: {error}", fix=_AGAIN) from error
    for engine in manifest["engines"]:
        if engine["graph"] not in manifest["graphs"]:
            raise BundleError(f"{name}: engine for an unknown graph {engine['graph']!r}")
    return manifest


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError(f"a key comes twice among {sorted(key for key, _ in pairs)[:8]}")
    return out


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _entries(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every file that the manifest lists."""
    return [
        *manifest["graphs"].values(),
        manifest["init"],
        *manifest["engines"],
        *manifest["golden"],
        manifest["licence"],
    ]


class _Text(NamedTuple):
    """A string that matches a pattern."""

    pattern: str


class _Count(NamedTuple):
    """A whole number in a range."""

    low: int
    high: int


_PATH = _Text(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,99})?")
_ANY = _Text(r"(?s).{0,100000}")
_FILE = {"file": _PATH, "sha256": _Text("[0-9a-f]{64}"), "size": _Count(1, FILE_BYTES)}
_SHAPE = [(_Count(-1, 2**31), _Text(r".{1,100}"))]
_PORT = {"name": _Text(r".{1,200}"), "dtype": _Text("[a-z0-9]{1,20}"), "shape": _SHAPE}
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
    "seconds": (float, _Count(0, 10**6)),
    "inputs": _PORTS,
    "outputs": _PORTS,
}
_PRIOR_NETWORK = {"kind": _Text("network"), "output": _Text("logits|probabilities|labels")}
_PRIOR_KMEANS = {
    "kind": _Text("kmeans"),
    "clusters": _Count(1, 256),
    "temperature": (float, _Count(1, 1000)),
}
_SPEC: dict[str, Any] = {
    "schema": _Text(re.escape(SCHEMA)),
    "name": _Text(r"[^/\0]{1,200}"),
    "created": _Text(r"[0-9TZ:.+-]{1,40}"),
    "sdk": _Text(r"[0-9A-Za-z.+-]{1,40}"),
    "prior": (_PRIOR_NETWORK, _PRIOR_KMEANS),
    "model": {"name": _ANY, "trained": bool},
    "preprocess": (dict, None),
    "classes": ([_ANY], None),
    "graphs": {f"{name}?": _GRAPH for name in GRAPHS},
    "refine": dict,
    "init": _FILE,
    "engines": [_ENGINE],
    "golden": [_FILE | {"steps": _Count(0, 10**6)}],
    "verification": dict,
    "recipe": dict,
    "licence": _FILE | {"text": _ANY},
    "sha256": _Text("[0-9a-f]{64}"),
}


def _check(value: Any, spec: Any, where: str) -> None:
    """ValueError, naming the place, unless ``value`` has the form of ``spec``."""
    if isinstance(spec, _Text):
        fits = isinstance(value, str) and re.fullmatch(spec.pattern, value) is not None
    elif isinstance(spec, _Count):
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = whole and spec.low <= value <= spec.high
    elif isinstance(spec, tuple):  # one of these
        problems = []
        for choice in spec:
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


# --- files -------------------------------------------------------------------------------------


def _read(folder: Path, file: str, size: int | None) -> bytes:
    """The bytes of a regular file inside ``folder``; symbolic links are not followed."""
    *folders, name = file.split("/")
    where = f"{folder.name}/{file}"
    opened = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for part in folders:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            opened.append(os.open(part, flags, dir_fd=opened[-1]))
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not block
        opened.append(os.open(name, flags, dir_fd=opened[-1]))
        info = os.fstat(opened[-1])
        most = MANIFEST_BYTES if size is None else size
        if not stat.S_ISREG(info.st_mode):
            raise BundleError(f"{where} is no regular file", fix=_AGAIN)
        if info.st_size > most or (size is not None and info.st_size != size):
            wanted = f"at most {most}" if size is None else f"the manifest says {size}"
            raise BundleError(f"{where} has {info.st_size} bytes; {wanted}", fix=_AGAIN)
        parts, left = [], most + 1
        while left and (part_read := os.read(opened[-1], min(left, 2**24))):
            parts.append(part_read)
            left -= len(part_read)
        return b"".join(parts)
    except FileNotFoundError as error:
        raise BundleError(f"{where} is missing", fix=_AGAIN) from error
    except (OSError, ValueError) as error:
        text = getattr(error, "strerror", None) or error
        raise BundleError(f"{where} cannot be read: {text} (links are not followed)") from error
    finally:
        for descriptor in opened:
            os.close(descriptor)


def file_entry(file: str, data: bytes) -> dict[str, Any]:
    """The manifest's entry of a file."""
    return {"file": file, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def write_bundle(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], files: Mapping[str, bytes]
) -> Bundle:
    """Write a bundle to a temporary sibling, read it back, and rename it into place.

    An existing bundle is replaced; anything else of that name is left alone. A crash leaves the old
    bundle, or none between two renames, never half of one.

    Raises
    ------
    InputError : ``path`` is something other than a bundle, or cannot be written.
    """
    folder = Path(path)
    check_replaceable(folder)
    place = folder.resolve()  # a link to a bundle keeps pointing there
    partial = place.with_name(f".{place.name}.partial-{os.getpid()}")
    replaced = place.with_name(f".{place.name}.replaced-{os.getpid()}")
    try:
        _remove_abandoned(place)
        partial.mkdir(parents=True)
        for file, data in {**files, MANIFEST: _pretty(seal(manifest))}.items():
            target = partial / file
            target.parent.mkdir(exist_ok=True)
            _write_synced(target, data)
        Bundle.open(partial).check_files()
        if place.exists():
            place.rename(replaced)
        partial.rename(place)
        _sync_folder(place.parent)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}", fix="see -o") from error
    finally:
        if replaced.exists() and not place.exists():
            replaced.rename(place)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return Bundle.open(folder)


def check_replaceable(folder: Path) -> None:
    """InputError when ``folder`` is something that an export must not overwrite."""
    if folder.is_dir():
        replaceable = not any(folder.iterdir()) or (folder / MANIFEST).is_file()
    else:
        replaceable = not folder.exists()
    if not replaceable:
        raise InputError(
            f"{folder} exists and is no bundle; it is left alone", fix="choose another with -o"
        )


def add_engine(bundle: Bundle, entry: Mapping[str, Any], plan: bytes) -> Bundle:
    """Put an engine into a bundle: the file first, then the manifest that names it, each renamed
    into place. An engine of the same key is replaced."""
    engines = [e for e in bundle.manifest["engines"] if e["key"] != entry["key"]]
    manifest = seal({**bundle.manifest, "engines": [*engines, dict(entry)]})
    data = _pretty(manifest)
    parse_manifest(data, f"{bundle.name}/{MANIFEST}")
    try:
        for file, content in ((entry["file"], plan), (MANIFEST, data)):
            target = bundle.path / file
            target.parent.mkdir(exist_ok=True)
            partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
            try:
                _write_synced(partial, content)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{bundle.path} cannot be written: {error.strerror}") from error
    return Bundle.open(bundle.path)


def _pretty(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(place: Path) -> None:
    """Finish what a killed writer left: put a replaced bundle back, remove half-written ones."""
    for left in place.parent.glob(f".{place.name}.*-*"):
        kind, _, pid = left.name.rpartition("-")
        if not pid.isdigit() or _is_running(int(pid)):
            continue
        if kind.endswith(".replaced") and not place.exists():
            left.rename(place)
        elif kind.endswith((".replaced", ".partial")):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
