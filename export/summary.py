"""What an export tells its user at the end: a few lines, or one JSON document."""

from __future__ import annotations

import json

from export.pack import Exported
from runtime.engines.named_files import shell_word, utf8_text
from runtime.tools.inspect import picture_words


def summary(exported: Exported) -> list[str]:
    """The lines that the export prints at its end: the bundle, what was verified, the engines, and
    the next command.

    Example
    -------
    >>> for line in summary(export_bundle(kmeans(), "colours.bundle")): print(line)
    """
    bundle = exported.bundle
    manifest = bundle.manifest
    entries = [*manifest["graphs"].values(), *manifest["engines"], *manifest["golden"]]
    size = sum(e["size"] for e in [*entries, manifest["init"], manifest["licence"]])
    lines = [
        f"saved    {utf8_text(str(bundle.path))}/  "
        f"({size / 1e6:.1f} MB, {len(manifest['graphs'])} graphs, "
        f"{len(manifest['engines'])} engines)"
    ]
    if (rule := manifest["preprocess"]) and rule["resize"] == "stretch":
        lines.append(f"input    {rule['height']}x{rule['width']}")
        if exported.frozen_size:
            lines[-1] += ", free in the file: --imgsz sets another size, --dynamic keeps it free"
    elif rule:
        lines.append(f"input    of free size: the long side becomes {rule['long_side']}")
    done = manifest["verification"]
    lines.append(f"verify   on {picture_words(done['pictures'], done['pictures_note'])}")
    if sizes := done.get("prior", {}).get("sizes"):
        lines[-1] += f"; the first also at {', '.join(sizes)}"
    for precision, numbers in done.get("prior", {}).items():
        if isinstance(numbers, dict):
            of, other = ("frozen", "original") if precision == "frozen" else (precision, "fp32")
            lines.append(
                f"verify   prior {of} vs {other}: {numbers['agreement']:.2%} of labels agree "
                f"(worst {numbers['worst']:.2%}, {numbers['worst_picture']}), "
                f"max |d| {numbers['max_abs']:.2g}  ok"
            )
    lines += [f"output   {note}" for note in done.get("output", [])]
    refine = done["refine"]
    lines.append(
        f"verify   {manifest['refine']['objective']} step vs float64: update "
        f"{refine['update']:.1e} relative; vs native core: {refine['agreement']:.2%} of labels  ok"
    )
    if "cnn" in manifest["graphs"]:
        steps = manifest["refine"]["steps"]
        lines.append(
            f"verify   trained weights vs float64: max |d| {done['cnn']['scores']:.1e}; the bundle "
            f"refines in {steps} step{'s' * (steps != 1)}  ok"
        )
    for engine in manifest["engines"]:
        layers = engine["receipt"]["layers"]
        total = max(1, sum(layers.values()))
        shares = ", ".join(f"{n / total:.0%} {kind}" for kind, n in sorted(layers.items()))
        where = ",".join(engine["compute_capabilities"]) or "this GPU"
        lines.append(
            f"receipt  {engine['graph']} {engine['runtime']} {engine['version']} for {where}: "
            f"{shares} ({total} layers, by the {engine['receipt']['source']})"
        )
    if not manifest["model"]["trained"]:
        fix = "" if "training" in manifest["model"] else " (--weights)"
        lines.append(f"warning  the prior has RANDOM weights: its labels mean nothing{fix}")
    if found := done.get("one_class"):
        lines.append(
            f"warning  the prior returns one class (number {', '.join(map(str, found['classes']))},"
            f" mean confidence {found['confidence']:.2f}) in every pixel of each picture"
        )
        if not done["allow_one_class"]:
            lines[-1] += ": name pictures with several classes (--pictures FILE...)"
    path = shell_word(str(bundle.path))
    if exported.missing is not None:
        lines.append(f"next     on the device: python -m runtime build {path}")
    else:
        lines.append(f"next     python -m sdk predict PICTURE --prior {path}")
    return lines


def to_json(exported: Exported) -> str:
    """One JSON document about an exported bundle: its path, its manifest, and why engines are
    missing."""
    bundle, missing = exported.bundle, exported.missing
    document = {"bundle": utf8_text(str(bundle.path)), "manifest": bundle.manifest}
    return json.dumps(document | {"missing": str(missing) if missing else None}, indent=1)
