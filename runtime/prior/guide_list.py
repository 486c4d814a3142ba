"""The manifest of guides that were computed beforehand: guides.json in a folder of masks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.checks import is_count
from runtime.engines.named_files import read_regular, shell_word
from runtime.errors import InputError
from runtime.files import shown
from runtime.prior.names import class_names

SCHEMA = "dg-guides/1"
GUIDES = "guides.json"
UNKNOWN = 2**16 - 1  # the label of unknown pixels in the files


@dataclass(frozen=True)
class GuideList:
    """What guides.json says.

    Parameters
    ----------
    model : "name", "kind" and "sha256" of the prior.
    options : how the guides were computed and stored; "soft": probabilities, not labels.
    names : of the classes, or None.
    pictures : for each finished picture, by its path relative to the folder of pictures, "sha256"
        of the picture's file; "file", the path of its guide relative to the folder of masks; and
        "file_sha256" of the guide. Paths have "/" between their parts.
    """

    model: dict[str, Any]
    options: dict[str, Any]
    names: list[str] | None
    pictures: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> GuideList:
        """Read the manifest of a folder.

        Raises
        ------
        InputError : it cannot be read, has another schema, or is damaged.

        Example
        -------
        >>> GuideList.read(Path("masks")).model["name"]
        'prior.onnx'
        """
        path = folder / GUIDES
        data = read_regular(path, "the manifest of a folder of masks")
        fix = (
            "copy the folder again; or remove it and compute its guides again: "
            f"rm -r {shell_word(str(folder))}"
        )
        try:
            found = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{shown(path)} is no JSON document", fix=fix) from error
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema != SCHEMA:
            raise InputError(
                f"{shown(path)} has schema {str(schema)[:80]!r}; this version reads {SCHEMA!r}",
                fix=f"update the SDK, or {fix}",
            )
        for name, right in (
            ("model", isinstance(found.get("model"), dict)),
            ("options", isinstance(found.get("options"), dict)),
            ("unknown", is_count(found.get("unknown"), UNKNOWN, UNKNOWN)),
            ("pictures", _are_pictures(found.get("pictures"))),
        ):
            if not right:
                raise InputError(f"{shown(path)} is damaged: {name}", fix=fix)
        names = found.get("names")
        if names is not None:
            names = class_names(names, f"{shown(path)}: names")
        return cls(found["model"], found["options"], names, found["pictures"])

    def to_json(self) -> bytes:
        """Return the content of guides.json, with the pictures in the order of their paths."""
        document = {
            "schema": SCHEMA,
            "model": self.model,
            "options": self.options,
            "names": self.names,
            "unknown": UNKNOWN,
            "pictures": {name: self.pictures[name] for name in sorted(self.pictures)},
        }
        return (json.dumps(document, indent=1) + "\n").encode()


def _are_pictures(found: Any) -> bool:
    return isinstance(found, Mapping) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256")))
        and re.fullmatch("[0-9a-f]{64}", str(entry.get("file_sha256")))
        for entry in found.values()
    )
