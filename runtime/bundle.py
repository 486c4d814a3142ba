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
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.core.config import RefineConfig
from runtime.engines.onnx_file import check_self_contained
from runtime.engines.port import Port
from runtime.errors import BundleError, InputError, SdkError
from runtime.prior.preprocess import Preprocess

SCHEMA = "dg-bundle/1"
MANIFEST = "manifest.json"
MANIFEST_BYTES = 2**22
FILE_BYTES = 2**31 - 1  # of one file
DEPTH = 20  # of the manifest's lists and objects
GRAPHS = ("prior", "refine_step", "refine_map", "cnn")


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
        if not os.path.isdir(folder):  # False, too, for names that no folder can have
            fix = "unpack it" if os.path.isfile(folder) else f"seen from {os.path.abspath('.')}"
            raise InputError(f"{str(folder)[:200]} is no folder; a bundle is one", fix=fix)
        if not os.path.lexists(folder / MANIFEST):
            raise BundleError(
                f"{str(folder)[:200]} is no bundle: it has no {MANIFEST}",
                fix="python -m export makes bundles; name the folder that it wrote",
            )
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
            )
        return data

    def graph(self, name: str) -> bytes:
        """The ONNX bytes of a graph, without external data."""
        if name not in self.manifest["graphs"]:
            raise BundleError(
                f"{self.name} has no graph {name!r}; "
                f"it has {', '.join(self.manifest['graphs']) or 'none'}",
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
                    f"{self.name}: graph {name!r} has {kind} {str(ports_entry(ports))[:800]}, "
                    f"the manifest says {str(entry[kind])[:800]}",
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
        raise BundleError(f"{name} is no safetensors file: {error}") from error
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
        raise BundleError(f"{name} has {len(data)} bytes; at most {MANIFEST_BYTES}")
    try:
        manifest = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name} cannot be read: {_short(error)}") from error
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
        raise BundleError(f"{name}: {_short(error)}") from error
    if sealed != manifest["sha256"]:
        raise BundleError(f"{name} was changed after it was written")
    files = [entry["file"] for entry in _entries(manifest)]
    if len({*files, MANIFEST}) < len(files) + 1:
        raise BundleError(f"{name} lists a file twice, or itself")
    if manifest["preprocess"] is not None:
        Preprocess.from_manifest(manifest["preprocess"])
    kind = manifest["prior"]["kind"]
    if (kind == "network") != ("prior" in manifest["graphs"]) or (
        (kind == "network") != (manifest["preprocess"] is not None)
    ):
        raise BundleError(f"{name}: prior, graphs and preprocess do not fit together")
    try:
        Bundle(Path(name), manifest).refine()
    except (SdkError, TypeError, OverflowError) as error:
        raise BundleError(f"{name}: refine: {_short(error)}") from error
    for engine in manifest["engines"]:
        if engine["graph"] not in manifest["graphs"]:
            raise BundleError(f"{name}: engine for an unknown graph {engine['graph']!r}")
    return manifest


def _canonical(body: Mapping[str, Any]) -> bytes:
    """UTF-8, which half a surrogate pair does not have: no such name can be printed or saved."""
    text = json.dumps(
        body, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )
    return text.encode()


def _short(error: Exception) -> str:
    """Without its fix, and without megabytes of what somebody wrote into the manifest."""
    text = str(error).split("\n  fix: ")[0]
    return text if len(text) <= 300 else f"{text[:300]}..."


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


def _check_depth(value: Any) -> None:
    """ValueError when lists and objects are nested deeper than printing and copying them can go."""
    level = [value]
    for _ in range(DEPTH):
        nested = [v for v in level if isinstance(v, (dict, list))]
        level = [v for box in nested for v in (box.values() if isinstance(box, dict) else box)]
    if level:
        raise ValueError(f"lists and objects are nested more than {DEPTH} deep")


class _Text(NamedTuple):
    """A string that matches a pattern."""

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
_ANY = _Text(r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]{0,100000}")  # nothing that steers a terminal
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
_SPEC: dict[str, Any] = {
    "schema": _Text(re.escape(SCHEMA)),
    "name": _Text(r"[^/\x00-\x1f\x7f-\x9f]{1,200}"),
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
    "golden": [_FILE | {"steps": _Count(0, 100)}],
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
    elif isinstance(spec, _Number):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = number and spec.low <= value <= spec.high
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
    opened: list[int] = []
    try:
        opened.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
        for part in folders:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            opened.append(os.open(part, flags, dir_fd=opened[-1]))
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not block
        opened.append(os.open(name, flags, dir_fd=opened[-1]))
        info = os.fstat(opened[-1])
        most = MANIFEST_BYTES if size is None else size
        if not stat.S_ISREG(info.st_mode):
            raise BundleError(f"{where} is no regular file")
        if info.st_size > most or (size is not None and info.st_size != size):
            wanted = f"at most {most}" if size is None else f"the manifest says {size}"
            raise BundleError(f"{where} has {info.st_size} bytes; {wanted}")
        parts, left = [], most + 1
        while left and (part_read := os.read(opened[-1], min(left, 2**24))):
            parts.append(part_read)
            left -= len(part_read)
        return b"".join(parts)
    except FileNotFoundError as error:
        raise BundleError(f"{where} is missing") from error
    except OSError as error:
        raise BundleError(
            f"{where} cannot be read: {error.strerror} (links are not followed)"
        ) from error
    finally:
        for descriptor in opened:
            os.close(descriptor)


def file_entry(file: str, data: bytes) -> dict[str, Any]:
    """The manifest's entry of a file."""
    return {"file": file, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def write_bundle(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], files: Mapping[str, bytes]
) -> Bundle:
    """Write a bundle beside its place, read it back, and rename it into place.

    An existing bundle is replaced; anything else of that name is left alone. A crash leaves the old
    bundle, or none between two renames, never half of one; the next writer cleans up.

    Raises
    ------
    InputError : ``path`` is something other than a bundle, or cannot be written.
    BundleError : manifest and files do not fit together; nothing is written.
    """
    check_replaceable(path)
    place = Path(os.path.realpath(Path(path)))  # a link to a bundle keeps pointing there
    data = _sealed(manifest)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place)
        work = Path(tempfile.mkdtemp(prefix=_work_prefix(place), dir=place.parent))
        try:
            with _locked(work):
                _fill(work / "new", {**files, MANIFEST: data})
                Bundle.open(work / "new").check_files()
                check_replaceable(place)  # still
                if place.exists():
                    place.rename(work / "old")
                (work / "new").rename(place)
                _sync_folder(place.parent)
        finally:
            _put_back(work, place)
    except OSError as error:
        raise _unwritable(path, error) from error
    return Bundle.open(path)


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """InputError when ``path`` is something that an export must not overwrite."""
    folder = Path(path)  # "" is "."
    try:
        replaceable = not os.path.exists(folder) or not os.listdir(folder)
        if not replaceable:  # a damaged bundle counts, another program's manifest.json does not
            with (folder / MANIFEST).open("rb") as file:
                replaceable = b'"dg-bundle/' in file.read(MANIFEST_BYTES)
    except OSError:
        replaceable = False
    if not replaceable:
        raise InputError(
            f"{str(folder)[:200]} exists and is no bundle; it is left alone",
            fix="choose another with -o",
        )


def add_engine(bundle: Bundle, entry: Mapping[str, Any], plan: bytes) -> Bundle:
    """Put an engine into a bundle: the file first, then the manifest that names it, each renamed
    into place. An engine of the same key leaves the manifest before its file is replaced."""
    if not file_entry(entry["file"], plan).items() <= entry.items():
        raise BundleError(f"{entry['file']} is not the engine that its entry describes")
    try:
        with _locked(bundle.path):
            manifest = Bundle.open(bundle.path).manifest  # with what others have added meanwhile
            others = [e for e in manifest["engines"] if e["key"] != entry["key"]]
            without = _sealed({**manifest, "engines": others})
            whole = _sealed({**manifest, "engines": [*others, dict(entry)]})
            parse_manifest(whole, f"{bundle.name}/{MANIFEST}")
            if len(others) < len(manifest["engines"]):
                _replace(bundle.path, MANIFEST, without)
            _replace(bundle.path, entry["file"], plan)
            _replace(bundle.path, MANIFEST, whole)
    except OSError as error:
        raise _unwritable(bundle.path, error) from error
    return Bundle.open(bundle.path)


def _unwritable(path: str | os.PathLike[str], error: OSError) -> InputError:
    return InputError(
        f"{path} cannot be written: {error.strerror or error}",
        fix="make room or give yourself the right to write there, or choose another place",
    )


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's file."""
    try:
        return (json.dumps(seal(manifest), indent=1) + "\n").encode()
    except ValueError as error:  # NaN, half a surrogate pair
        raise BundleError(
            f"the manifest cannot be written: {_short(error)}", fix="see the value it names"
        ) from error


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """A new folder with ``files``, all on the disk."""
    folder.mkdir()
    for file, data in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        _write_synced(folder / file, data)
    for inner in {(folder / file).parent for file in files}:
        _sync_folder(inner)


def _replace(folder: Path, file: str, data: bytes) -> None:
    """Write ``file`` under another name and rename it; never through a link."""
    target = folder / file
    if target.parent.is_symlink():
        raise BundleError(f"{folder.name}/{file} lies behind a link; not written")
    target.parent.mkdir(exist_ok=True)
    prefix = f".{target.name}.partial-"
    for name in os.listdir(target.parent):
        if name.startswith(prefix):  # of a writer that was killed
            (target.parent / name).unlink()
    partial = target.with_name(prefix + secrets.token_hex(4))
    try:
        _write_synced(partial, data)
        partial.replace(target)
        _sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold a folder's lock, which ends with its holder; BlockingIOError when another has it."""
    import fcntl  # not on every system that can import this

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _work_prefix(place: Path) -> str:
    return f".{place.name}.partial-"


def _put_back(work: Path, place: Path) -> None:
    """Remove a writer's folder; a bundle that it has moved away goes back if its place is free."""
    if (work / "old").exists():
        # What is half removed must never be taken for what has to go back.
        (work / "old").rename(work / "trash" if place.exists() else place)
    shutil.rmtree(work, ignore_errors=True)


def _remove_abandoned(place: Path) -> None:
    """Clean up after writers that were killed."""
    for name in os.listdir(place.parent):
        if name.startswith(_work_prefix(place)) and not (place.parent / name).is_symlink():
            try:
                with _locked(place.parent / name, wait=False):
                    _put_back(place.parent / name, place)
            except OSError:  # its writer is at work, or it is none of ours
                continue
