"""The goals for the times on a GPU."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.gpu.device import FAST


def goals(case: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the measured rows of a case with its goals.

    Parameters
    ----------
    case : the name of the case.
    found : its rows, from timing.measure.

    Returns
    -------
    For each goal its text, the measured value, and whether the value meets the goal. Both are None
    if the value was not measured.
    """
    by = {(row["who"], row["precision"]): row for row in found}
    out: list[dict[str, Any]] = []

    def goal(what: str, bound: str, limit: float, value: float | None) -> None:
        met = None if value is None else value >= limit if bound == ">=" else value <= limit
        text = f"{case}: {what} {bound} {limit:g}"
        out.append({"goal": text, "value": value, "met": met})

    def value(who: str, precision: str, name: str) -> float | None:
        return by.get((who, precision), {}).get(name)

    def fastest(precision: str, kinds: tuple[str, ...]) -> float | None:
        """Return the time of the fastest peer whose name contains one of ``kinds``, divided by our
        time. For a precision of FAST, the peer may have any precision of FAST."""
        allowed = FAST if precision in FAST else (precision,)
        found = (
            row for (who, p), row in by.items() if p in allowed and any(k in who for k in kinds)
        )
        return min((row["x ours"] for row in found if "x ours" in row), default=None)

    if case.startswith("guided filter"):
        goal("of copy", ">=", 0.5, value("ours", "", "of copy"))
        goal("x torch eager", ">=", 5, value("torch eager", "", "x ours"))
    limits: dict[str, tuple[str, dict[str, float]]] = {
        "residual": ("device ms", {"fp32": 1.0, "fp16": 1.0}),
        "dynaguide": ("ms/step", {"fp32": 2.5, "fp16": 0.6}),
    }
    name, each = limits.get(case.split()[0], ("", {}))
    for precision, limit in each.items():
        goal(f"{precision}, {name}", "<=", limit, value("ours", precision, name))
        goal(f"{precision}, x torch eager", ">=", 4, fastest(precision, ("eager",)))
        best = fastest(precision, ("graph", "compiled"))
        goal(f"{precision}, x best graphed or compiled torch", ">=", 2, best)
    return out
