"""What is asked of an objective is asked in one place, by a function with a name."""

import pytest
from source_rules import PACKAGES, ROOT, objective_comparisons


def test_no_objective_is_compared_with_a_name_elsewhere():
    assert objective_comparisons(ROOT, *PACKAGES) == []


@pytest.mark.parametrize(
    "line",
    [
        'config.objective == "residual"',
        '"dynaseg" != options.objective',
        'objective in ("residual", "dynaguide")',
        'manifest["objective"] == "new"',
        'options.get("objective", "residual") == "residual"',
        "match config.objective:\n    case _: pass",
    ],
)
def test_the_rule_sees_comparisons(tmp_path, line):
    for folder in ("core", "bundle"):
        (tmp_path / "runtime" / folder).mkdir(parents=True)
    (tmp_path / "runtime/core/parameters.py").write_text(line)
    (tmp_path / "runtime/bundle/golden.py").write_text(f"pass\n{line}\n")
    (found,) = objective_comparisons(tmp_path, "runtime")
    assert found.startswith("runtime/bundle/golden.py:2: ")


@pytest.mark.parametrize(
    "line", ["config.objective == other.objective", "takes_soft_guide(config.objective)"]
)
def test_other_uses_of_an_objective_are_free(tmp_path, line):
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime/files.py").write_text(line)
    assert objective_comparisons(tmp_path, "runtime") == []
