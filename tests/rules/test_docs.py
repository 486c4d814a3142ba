"""The documents agree with the sources: files, links, commands and scripts that they name exist."""

import re
import subprocess
import sys

import pytest
from source_rules import PACKAGES, ROOT, project_files, relative

DOCUMENTED = (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".sh")
PAGES = [
    p
    for p in project_files(ROOT)
    if p.suffix == ".md" and p.parent in (ROOT, ROOT / "docs") and p.name != "CHANGELOG.md"
]
EXAMPLES = [p for p in project_files(ROOT) if p.parent == ROOT / "examples" and p.suffix == ".py"]


def described_files(page):
    """(path, sentence) of each row of the tables below headings such as ### `sdk/`."""
    found, folder = [], None
    for line in page.splitlines():
        if heading := re.match(r"#+ (?:`([\w/]+)/`)?", line):
            folder = heading[1]
        elif folder and (row := re.match(r"\| (`.*`) \| (.*) \|$", line)):
            found += [(f"{folder}/{name}", row[2]) for name in re.findall(r"`(.*?)`", row[1])]
    return found


def sources(files, root):
    """The files of the packages that the page describes."""
    names = (relative(p, root) for p in files if p.suffix in DOCUMENTED)
    return sorted(name for name in names if name.split("/")[0] in PACKAGES)


def wrong_rows(page, expected):
    """Files without a row, files with two, and rows of files that do not exist."""
    names = [name for name, _ in described_files(page)]
    return [
        *(f"{name} has no row" for name in expected if name not in names),
        *(f"{name} has {names.count(name)} rows" for name in expected if names.count(name) > 1),
        *(f"{name} does not exist" for name in names if name not in expected),
    ]


def test_the_architecture_page_names_each_source_file_once():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert wrong_rows(page, sources(project_files(ROOT), ROOT)) == []
    for name, sentence in described_files(page):
        assert len(sentence.split()) >= 4, f"{name}: {sentence!r} is no sentence"


def test_the_rule_sees_wrong_rows():
    rows = "| `a.py`, `b.py` | contain two functions |\n| `a.py` | contains one function |\n"
    page = f"## Files\n\n| `no.py` | is outside a folder |\n\n### `sdk/`: text\n\n{rows}"
    assert wrong_rows(page, ["sdk/a.py", "sdk/c.py"]) == [
        "sdk/c.py has no row",
        "sdk/a.py has 2 rows",
        "sdk/b.py does not exist",
    ]


def test_each_decision_names_the_script_of_its_numbers():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = page.split("## Decisions that rest on measurements")[1].split("\n## ")[0]
    decisions = re.split(r"\n- ", section)[1:]
    assert len(decisions) > 5
    for decision in decisions:
        scripts = re.findall(r"`((?:benchmarks|tests)/[\w./]+)", decision)
        assert scripts or "*unrepeatable*" in decision, decision.split("\n")[0]
        assert all((ROOT / script).exists() for script in scripts), decision.split("\n")[0]


def anchors(page):
    """The names by which links reach the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.M)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {word.replace(" ", "-") for word in words}


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_links_and_named_files_exist(path):
    page = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", page):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name) if name else path
        assert there.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{target} has no heading"
    top = "|".join((*PACKAGES, "tests", "docs", "examples"))
    for name in re.findall(rf"`((?:{top})/[\w./-]+\.\w+)(?:[ :`])", page):
        assert "NAME" in name or (ROOT / name).exists(), f"{name} does not exist"


def test_functions_that_the_algorithm_page_names_exist():
    page = (ROOT / "docs/algorithm.md").read_text(encoding="utf-8")
    python = (ROOT / "runtime/core/reference.py").read_text(encoding="utf-8")
    core = "".join(
        p.read_text(encoding="utf-8") for p in sorted((ROOT / "runtime/csrc/cpu").iterdir())
    )
    rows = 0
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) < 3 or not set("`") & set(cells[-1]):
            continue
        rows += 1
        for cell, text in ((cells[-2], python), (cells[-1], core)):
            for name in re.findall(r"`([A-Za-z_:]+)`", cell):
                name = name.rpartition("::")[2]
                assert re.search(rf"\b{name}\(", text), f"{name} of {line!r} does not exist"
    assert rows > 10


def test_kernels_that_their_page_names_exist():
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    sources = (ROOT / "runtime/csrc/cuda").iterdir()
    code = "".join(p.read_text(encoding="utf-8") for p in sorted(sources))
    named = re.findall(r"`([a-z_]+)(?:<Taps>)?`", page)
    kernels = [name for name in named if "_" in name and not name.startswith(("_", "user_"))]
    assert len(kernels) > 20
    assert [name for name in kernels if not re.search(rf"\b{name}\b", code)] == []


def test_only_the_readme_says_what_was_run_on_a_device():
    """The other pages link to its table."""
    claim = re.compile(r"\b(not|never|nothing|no)\b[^.|]{0,40}\brun on an? (GPU|Jetson|device)")
    for path in PAGES:
        if path != ROOT / "README.md":
            text = " ".join(path.read_text(encoding="utf-8").split())
            assert not (found := claim.search(text)), f"{relative(path)}: {found[0]}"


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") < 150


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_examples_explain_themselves(path):
    command = [sys.executable, str(path), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    assert done.stderr == ""
