"""OpenCV and ONNX Runtime. Several packages contain each of them: its flavours.

The project uses the flavour that is installed and requires none, because pip would install a
required flavour over another one. So pip does not compare versions either, and this module does:
LIBRARIES is the only list of lowest versions besides pyproject.toml, and a test compares the two.
The module imports neither library.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from typing import Any, NamedTuple

from runtime.errors import MissingBackend

LOG = logging.getLogger("dg.flavours")


class Library(NamedTuple):
    """Title, lowest supported version, and flavours: the packages of which one is needed."""

    title: str
    lowest: str
    flavours: tuple[str, ...]


LIBRARIES = {  # by import name
    "cv2": Library(
        "OpenCV",
        "4.8",
        (
            *("opencv-python", "opencv-python-headless"),
            *("opencv-contrib-python", "opencv-contrib-python-headless"),
        ),
    ),
    "onnxruntime": Library("ONNX Runtime", "1.18", ("onnxruntime", "onnxruntime-gpu")),
}


def missing(name: str, error: Exception) -> MissingBackend:
    """Return the error for a library that cannot be imported.

    Parameters
    ----------
    name : "cv2" or "onnxruntime".
    error : what the import raised.
    """
    title = LIBRARIES[name].title
    if _is_absent(name, error):
        return MissingBackend(f"{title} is not installed", fix=import_fix(name, error))
    return MissingBackend(
        f"{title} is installed but cannot be imported: {error}", fix=import_fix(name, error)
    )


def import_fix(name: str, error: Exception) -> str:
    """Return the fix for a library whose import raised ``error``."""
    if not _is_absent(name, error):
        return repair(name, str(error))
    first, *others = LIBRARIES[name].flavours
    one = f"pip install {first}   (or {', '.join(others)}"
    if name == "onnxruntime":  # OpenCV is installed, or it would have been missed before
        return f"{one}; 'dynaguide-edge[run]' installs opencv-python, too)"
    return (
        "pip install 'dynaguide-edge[run]'; or, to keep an ONNX Runtime that is installed already, "
        f"{one})"
    )


def _is_absent(name: str, error: Exception) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == name


def repair(name: str, reason: str) -> str:
    """Return the fix for a library that is installed but cannot be imported.

    Parameters
    ----------
    name : "cv2" or "onnxruntime".
    reason : the text of the error that the import raised.
    """
    flavours = LIBRARIES[name].flavours
    again = f"pip uninstall -y {' '.join(flavours)}; pip install"
    if name == "cv2" and re.search(r"numpy|_ARRAY_API", reason, re.IGNORECASE):
        return "pip install 'numpy<2', because this OpenCV was built for NumPy 1"
    if name == "cv2" and ".so" in reason:
        return f"apt-get install libgl1 libglib2.0-0, or {again} opencv-python-headless"
    if name == "onnxruntime" and re.search(r"libcu\w+\.so", reason):
        return "pip install 'onnxruntime-gpu!=1.27.0', because 1.27.0 needs CUDA 13's libraries"
    return f"{again} {flavours[0]}   (or another one of these)"


def check_version(name: str, module: Any) -> None:
    """Check an imported library; log once if its version is lower than the lowest supported.

    Raises
    ------
    MissingBackend : the module is an empty folder, which a package left when it was uninstalled.
    """
    version = str(getattr(module, "__version__", ""))
    if getattr(module, "__file__", None) is None:
        error = ImportError(f"{list(getattr(module, '__path__', []))} does not contain it")
        raise missing(name, error)
    if why := too_old(name, version):
        _warn_once(why)


@cache
def _warn_once(why: str) -> None:
    LOG.warning("%s; install a newer one", why)


def too_old(name: str, version: str) -> str:
    """Return why a version is too low, or ""; an unknown version is not too low."""
    library, found = LIBRARIES[name], re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) >= _parts(library.lowest):
        return ""
    return f"{library.title} {version} is older than {library.lowest}, the lowest supported version"


def _parts(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
