"""What is asked of an objective is asked in one place, by a function with a name."""

from cases import case
from source_rules import PACKAGES, ROOT, objective_comparisons


def test_no_objective_is_compared_with_a_name_elsewhere():
    assert objective_comparisons(ROOT, *PACKAGES) == []


COMPARISONS = [
    'config.objective == "residual"',
    '"dynaseg" != options.objective',
    'objective in ("residual", "dynaguide")',
    'manifest["objective"] == "new"',
    'options.get("objective", "residual") == "residual"',
    "match config.objective:\n    case _: pass",
]


def test_the_rule_sees_comparisons(tmp_path):
    for number, line in enumerate(COMPARISONS):
        with case(line):
            root = tmp_path / str(number)
            for folder in ("core", "bundle"):
                (root / "runtime" / folder).mkdir(parents=True)
            (root / "runtime/core/parameters.py").write_text(line)
            (root / "runtime/bundle/golden.py").write_text(f"pass\n{line}\n")
            found = objective_comparisons(root, "runtime")
            assert len(found) == 1, found
            assert found[0].startswith("runtime/bundle/golden.py:2: ")


FREE = ["config.objective == other.objective", "takes_soft_guide(config.objective)"]


def test_other_uses_of_an_objective_are_free(tmp_path):
    for number, line in enumerate(FREE):
        with case(line):
            root = tmp_path / str(number)
            (root / "runtime").mkdir(parents=True)
            (root / "runtime/files.py").write_text(line)
            assert objective_comparisons(root, "runtime") == []
