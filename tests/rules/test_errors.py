"""An error's message is read from ``.message``: nobody cuts it out of the text again."""

import pickle
import re
from pathlib import Path

from cases import case

from runtime import errors
from runtime.errors import BundleError, ExitCode, InputError, MissingBackend, SdkError, first_line

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("runtime", "sdk", "export", "benchmarks")
TEXT_OF_AN_ERROR = re.compile(
    r"(str\(|args\[).*(error|problem|missing|cause|exception|picture)"
    r"|(error|problem|missing|cause|exception).*args\[",
    re.IGNORECASE,
)
CUT = re.compile(r"\.(partition|rpartition|split|splitlines)\(")


def cuts(text):
    """Lines that cut a message out of an error's text."""
    return [
        line.strip()
        for line in text.splitlines()
        if CUT.search(line) and (TEXT_OF_AN_ERROR.search(line) or "\\n  fix: " in line)
    ]


CUTS = [
    'why = str(error).partition("\\n")[0]',
    'text = str(error).split("\\n  fix: ")[0]',
    'return text.partition("\\n  fix: ")[0]',
    'return str(cuda_problem() or "").partition("\\n")[0]',
    "reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]",
    "return f'{str(error).splitlines()[0]}'",
]


def test_the_rule_sees_a_cut():
    for line in CUTS:
        with case(line):
            assert cuts(line) == [line]


def test_no_message_is_cut_out_of_an_errors_text():
    own = ROOT / "runtime/errors.py"
    found = {
        f"{path.relative_to(ROOT)}: {line}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if path != own
        for line in cuts(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_message_and_fix_stand_apart_and_together():
    error = MissingBackend("no driver\nat all", fix="install it")
    assert (error.message, error.fix) == ("no driver\nat all", "install it")
    assert str(error) == "no driver\nat all\n  fix: install it"
    assert str(InputError("no fix")) == InputError("no fix").message == "no fix"
    again = pickle.loads(pickle.dumps(error))
    assert (again.message, again.fix, str(again)) == (error.message, error.fix, str(error))


def test_first_line_of_any_error():
    assert first_line(BundleError("broken", fix="mend it")) == "broken"
    assert first_line(ValueError("\none\ntwo")) == "one"
    assert first_line(OSError(5, "Input/output error", "a.png")) == "Input/output error"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_exit_codes_are_those_that_the_documents_say():
    codes = {code.name: int(code) for code in ExitCode}
    assert codes == {
        "DONE": 0,
        "FAILURE": 1,
        "USAGE": 2,
        "VERIFICATION": 3,
        "MISSING": 4,
        "BUNDLE": 5,
        "THRESHOLD": 6,
        "INTERRUPTED": 130,
    }
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    ours = [kind for kind in kinds if issubclass(kind, SdkError)]
    assert len(ours) >= 7 and all(isinstance(kind.exit_code, ExitCode) for kind in ours)
    for document in ("README.md", "docs/export.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert "`ExitCode`" in text and all(f"{int(code)} " in text for code in ExitCode)
