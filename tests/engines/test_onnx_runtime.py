"""How ONNX Runtime is used: its telemetry is off, and processes that were forked from one that has
loaded a network end."""

import ast
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from cases import case
from one_layer_networks import save
from source_rules import PACKAGES, ROOT, parse, python_files, relative

from runtime.engines.onnx_runtime import TELEMETRY, import_onnxruntime, telemetry_off

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")


def run(program, *arguments, **variables):
    """What a program prints, in a new interpreter without the variable for the telemetry."""
    environment = {k: v for k, v in os.environ.items() if k not in (TELEMETRY, "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Telemetry

ENGINE = """
import os, sys, time
import numpy as np
tasks = lambda: set(os.listdir("/proc/self/task"))
before = tasks()
from runtime import load_engine
with load_engine(sys.argv[1], threads=1) as engine:
    engine(np.zeros((1, 3, 8, 12), np.float32))
    end = time.monotonic() + 10
    while tasks() != before and time.monotonic() < end:  # the thread of the first run ends
        time.sleep(0.01)
    assert tasks() == before, tasks() - before
"""
FREEZE = """
import sys
from pathlib import Path
from export.models.onnx_file import onnx_file
from export.to_onnx import freeze
freeze(onnx_file(Path(sys.argv[1])))
assert "onnxruntime" in sys.modules
"""
QUANTISE = """
import sys
from pathlib import Path
import numpy as np
from export.int8 import to_int8
to_int8(Path(sys.argv[1]).read_bytes(), [np.zeros((1, 3, 8, 12), np.float32)])
"""
PROBE = """
from runtime.tools.probe import probe
assert probe("onnxruntime")["state"] == "ready"
"""


def test_nothing_is_written_to_the_home_and_no_thread_remains(tmp_path):
    network = save(tmp_path / "m.onnx", np.eye(3), inputs=((1, 3, 8, 12),))
    for program in (ENGINE, FREEZE, QUANTISE, PROBE):
        with case(program):
            home = tmp_path / f"home{len(program)}"
            home.mkdir()
            run(program, network, HOME=str(home))
            assert list(home.rglob("*")) == []


def test_what_the_user_chose_remains(monkeypatch):
    for value in ("0", "1"):
        with case(value):
            monkeypatch.setenv(TELEMETRY, value)
            monkeypatch.setattr(onnxruntime, "disable_telemetry_events", pytest.fail)
            import_onnxruntime("test it")
            assert os.environ[TELEMETRY] == value


def test_an_empty_choice_is_none(monkeypatch):
    calls = []
    monkeypatch.setenv(TELEMETRY, "")
    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: calls.append(1))
    import_onnxruntime("test it")
    assert os.environ[TELEMETRY] == "1" and calls == [1]


def test_events_of_an_imported_library_are_switched_off_once(monkeypatch, caplog):
    monkeypatch.setenv(TELEMETRY, "")  # restored at the end
    monkeypatch.delenv(TELEMETRY)
    calls = []
    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: calls.append(1))
    with caplog.at_level(logging.INFO, "dg.onnx"):
        for _ in range(2):
            assert import_onnxruntime("test it") is onnxruntime
    (record,) = caplog.records
    assert calls == [1] and os.environ[TELEMETRY] == "1"
    assert "imported before its telemetry was switched off" in record.getMessage()
    assert f"Set {TELEMETRY}=1" in record.getMessage()
    monkeypatch.delenv(TELEMETRY)
    monkeypatch.delattr(onnxruntime, "disable_telemetry_events")  # old versions do not have it
    telemetry_off()
    assert os.environ[TELEMETRY] == "1"


def test_one_function_imports_onnx_runtime():
    places = {}
    for path in python_files(ROOT, *PACKAGES):
        for node in ast.walk(parse(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] == "onnxruntime":
                    places.setdefault(name, set()).add(relative(path))
    assert places.pop("onnxruntime") == {"runtime/engines/onnx_runtime.py"}
    parts = set.union(*places.values())  # these modules import the library or call telemetry_off
    for name in parts:
        source = (ROOT / name).read_text()
        assert "import_onnxruntime(" in source or "telemetry_off()" in source, name


# Forked processes

FORK = """
import multiprocessing, os, signal, sys, time
import numpy as np
import runtime
from runtime.errors import InputError
network, loads, ends = sys.argv[1:]

def engine():
    return runtime.OnnxEngine(network, threads=2)

x = np.zeros((1, 3, 8, 12), np.float32)
if loads == "import":
    from runtime.engines.onnx_runtime import import_onnxruntime
    import_onnxruntime("test it")
else:
    inherited = engine()
    wanted = inherited(x)
    loop = inherited.loop({}, {"image": ("scores", x)}) if loads == "loop" else None

def child():
    if loads == "import" or loads == "again":
        own = engine()
        assert loads == "import" or np.array_equal(own(x)[0], wanted[0])
    if loads != "import":
        uses = [lambda: inherited(x), lambda: inherited.loop({}, {})]
        uses += [loop.step] if loop else []
        for use in uses:
            try:
                use()
            except InputError as error:
                told = f"was loaded in process {os.getppid()}, and process {os.getpid()} is a fork"
                assert told in error.message
                assert "after the fork" in error.fix
            else:
                raise AssertionError("the child has used the session")
    if ends == "close":
        inherited.close()

if ends == "multiprocessing":
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    pid = process.pid
else:
    pid = os.fork()
    if pid == 0:
        child()
        if ends == "_exit":
            os._exit(0)
        sys.exit(0)
end = time.monotonic() + 10
while True:
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        break
    if time.monotonic() > end:
        os.kill(pid, signal.SIGKILL)
        raise SystemExit("the child did not end within 10 s")
    time.sleep(0.01)
assert status == 0, status
assert loads == "import" or np.array_equal(inherited(x)[0], wanted[0])  # the parent goes on
os._exit(0) if ends == "multiprocessing" else None  # the child is waited for already
"""


def test_a_forked_process_ends_and_must_not_use_the_session(tmp_path):
    network = save(tmp_path / "m.onnx", np.eye(3), inputs=((1, 3, 8, 12),))
    for loads, ends in [
        ("import", "exit"),
        ("engine", "exit"),
        ("engine", "close"),
        ("engine", "_exit"),
        ("engine", "multiprocessing"),
        ("loop", "exit"),
        ("again", "exit"),
    ]:
        with case(loads, ends):
            run(FORK, network, loads, ends)
