"""The first run of a network ends at a deadline or at Ctrl-C, also if the network never ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from cases import case
from onnx_files import info, model_of

import runtime.engines.onnx_runtime
from runtime import OnnxEngine, load_engine
from runtime.engines.onnx_runtime import Runner
from runtime.errors import DeviceError, InputError

onnx = pytest.importorskip("onnx", reason="the networks are made with onnx: pip install onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402 (after importorskip)

ENDLESS = np.array(2**62)
X = np.ones(2, np.float32)


def counting(shape=(2,), trips=None):
    """y = x + the number of trips of a loop: the input "trips", or a constant."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_in"], ["go_out"]),
            helper.make_node("Add", ["sum_in", "one"], ["sum_out"]),
        ],
        "body",
        [info("i", (), TensorProto.INT64), info("go_in", (), TensorProto.BOOL), info("sum_in", ())],
        [info("go_out", (), TensorProto.BOOL), info("sum_out", ())],
    )
    constants = {"go": np.array(True), "one": np.float32(1), "zero": np.float32(0)}
    inputs = [info("x", shape)]
    if trips is None:
        inputs.append(info("trips", (), TensorProto.INT64))
    else:
        constants["trips"] = trips
    nodes = [
        helper.make_node("Loop", ["trips", "go", "zero"], ["sum"], body=body),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    model = model_of(nodes, inputs, initializers=tensors)
    model.graph.output[0].CopyFrom(info("y", shape))
    return model


def engine(deadline_s):
    return OnnxEngine(counting().SerializeToString(), name="net", deadline_s=deadline_s)


@pytest.fixture
def made(monkeypatch):
    """The RunOptions that were made: those of first runs."""
    options, real = [], onnxruntime.RunOptions

    def make():
        options.append(real())
        return options[-1]

    monkeypatch.setattr(onnxruntime, "RunOptions", make)
    return options


LATE = r"the first run of net did not end within 0.3 s: it loops endlessly, or .* too slow for it"


def test_a_first_run_ends_at_the_deadline(made):
    start, net = time.monotonic(), engine(0.3)
    with pytest.raises(DeviceError, match=LATE) as caught:
        net(X, ENDLESS)
    assert "load it again" in caught.value.fix and "SEG_DEADLINE_S=300" in caught.value.fix
    assert 0.3 <= time.monotonic() - start < 10
    again = engine(60)
    for _ in range(3):  # later runs have no deadline
        assert again(X, np.array(3))[0].tolist() == [4, 4]
    assert len(made) == 2


def test_a_network_that_missed_its_deadline_fails_at_once(made):
    """So do the threads that wait for its first run."""
    net, start = engine(1), time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        errors = [pool.submit(net, X, ENDLESS).exception for _ in range(4)]
        assert [type(error()) for error in errors] == [DeviceError] * 4
        assert len({str(error()) for error in errors}) == 1
    assert 1 <= time.monotonic() - start < 4 and len(made) == 1
    net.runner.deadline_s = None
    calls = (
        lambda: net(X, np.array(3)),
        lambda: net.loop({"trips": np.array(3)}, {"x": ("y", X)}),
    )
    for i, call in enumerate(calls):
        with case(i), pytest.raises(DeviceError, match=r"did not end within 1 s: it loops"):
            call()
    assert len(made) == 1


def test_a_first_step_of_a_loop_ends_at_the_deadline(made):
    loop = engine(0.3).loop({"trips": ENDLESS}, {"x": ("y", X)})
    with pytest.raises(DeviceError, match=LATE):
        loop.step()
    with pytest.raises(DeviceError, match=LATE):
        loop.step(trips=np.array(3))
    assert loop.state()["x"].tolist() == [1, 1]
    loop = engine(60).loop({"trips": np.array(3)}, {"x": ("y", X)})
    for _ in range(2):
        loop.step()
    assert loop.state()["x"].tolist() == [7, 7] and len(made) == 2


class OnGpu(onnxruntime.InferenceSession):
    """A session whose first run on a GPU ends only when it is told to."""

    threads: ClassVar = []

    def io_binding(self):
        nothing = lambda *_: None  # noqa: E731
        return SimpleNamespace(bind_input=nothing, bind_output=nothing, get_outputs=list)

    def run_with_iobinding(self, binding, *options):
        self.threads.append(threading.get_ident())
        while len(self.threads) == 1:
            time.sleep(0.01)
            if options[0].terminate:
                raise RuntimeError("Exiting due to terminate flag being set to true.")


def test_a_run_on_the_gpu_ends_at_the_deadline(monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnGpu)
    net = OnnxEngine(counting(trips=3).SerializeToString(), name="net", deadline_s=0.3)
    array = SimpleNamespace(__cuda_array_interface__={"shape": X.shape, "data": (1, False)})
    with pytest.raises(DeviceError, match=LATE):
        net.on_gpu(array)
    net = OnnxEngine(counting(trips=3).SerializeToString(), name="net", deadline_s=60)
    for _ in range(2):
        assert net.on_gpu(array) == []
    here = threading.get_ident()
    assert [thread == here for thread in OnGpu.threads] == [False, False, True]


def test_another_error_of_a_first_run_is_raised_at_once(made):
    net = engine(60)
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(InputError, match=r"net fails on \(3, 3\), \(\): .*Invalid rank"):
            net(np.ones((3, 3)), np.array(3))
        assert time.monotonic() - start < 10
    assert net(X, np.array(3))[0].tolist() == [4, 4] and len(made) == 3


def test_a_deadline_is_a_number_above_0():
    for value in (0, -1.0, float("nan"), "60", True):
        with case(value):
            with pytest.raises(InputError, match=r"deadline_s is .*; wanted a number above 0"):
                engine(value)


def test_the_default_deadline_is_an_environment_variable(monkeypatch):
    data = counting().SerializeToString()
    values = {None: 60, "": 60, "300": 300, "0.5": 0.5, "0": None, "1e300": 1e300}
    for value, wanted in values.items():
        with case(value), monkeypatch.context() as patch:
            patch.delenv("SEG_DEADLINE_S", raising=False)
            if value is not None:
                patch.setenv("SEG_DEADLINE_S", value)
            net = OnnxEngine(data)
            assert net.runner.deadline_s == wanted
            assert net(X, np.array(3))[0].tolist() == [4, 4]
            for given in (7, None):
                assert OnnxEngine(data, deadline_s=given).runner.deadline_s == given
    for value in ("-1", "nan", "inf", "none", "60 s"):
        with case(value):
            monkeypatch.setenv("SEG_DEADLINE_S", value)
            with pytest.raises(InputError, match=f"SEG_DEADLINE_S is '{value}'; wanted") as caught:
                OnnxEngine(data)
            assert "0 for no limit" in caught.value.fix
            assert OnnxEngine(data, deadline_s=7).runner.deadline_s == 7


def test_the_default_deadline_of_load_engine(monkeypatch, tmp_path):
    (tmp_path / "net.onnx").write_bytes(counting().SerializeToString())
    monkeypatch.setenv("SEG_DEADLINE_S", "0.3")
    with pytest.raises(DeviceError, match=r"net.onnx did not end within 0.3 s"):
        load_engine(tmp_path / "net.onnx")(X, ENDLESS)
    assert load_engine(tmp_path / "net.onnx", deadline_s=7).runner.deadline_s == 7


def test_the_deadline_of_a_loaded_network_can_be_changed():
    net = engine(60)
    net.runner.deadline_s = 0.3
    with pytest.raises(DeviceError, match=LATE):
        net(X, ENDLESS)


def test_threads_wait_for_the_first_run_of_another(made):
    net = engine(60)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: net(X, np.array(n))[0].tolist(), range(16)))
    assert answers == [[n + 1, n + 1] for n in range(16)] and len(made) == 1


def test_the_lock_is_held_during_each_run_alone():
    lock = threading.Lock()
    runner = Runner("net", 60, lock)
    for _ in range(3):
        assert runner(lambda *_: lock.locked()) and not lock.locked()


def test_ctrl_c_ends_a_first_run(made):
    for deadline in (60, None):
        with case(deadline):
            net, start = engine(deadline), time.monotonic()
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                net(X, ENDLESS)
            assert time.monotonic() - start < 10 and made[-1].terminate
            assert net(X, np.array(3))[0].tolist() == [4, 4]


def test_close_ends_a_first_run(made):
    """The run, the threads that wait for it, and all later calls raise the same error."""
    for deadline in (20, None):
        with case(deadline), ThreadPoolExecutor(4) as pool:
            net, count = engine(deadline), len(made)
            loop = net.loop({"trips": ENDLESS}, {"x": ("y", X)})
            runs = [pool.submit(net, X, ENDLESS) for _ in range(2)] + [pool.submit(loop.step)]
            while len(made) == count:
                time.sleep(0.01)
            start = time.monotonic()
            net.close()
            for run in (*(r.result for r in runs), lambda: net(X, np.array(3)), loop.step):  # noqa: B023
                with pytest.raises(InputError, match="net is closed"):
                    run()
            assert time.monotonic() - start < 10 and len(made) == count + 1


def test_close_before_the_run_has_started():
    """The caller's thread has begun a first run, but ONNX Runtime has not."""
    runner = Runner("net", 60)

    def run(options):
        raise AssertionError("the session ran")

    real = onnxruntime.RunOptions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "RunOptions", lambda: (runner.close(), real())[1])
        with pytest.raises(InputError, match="net is closed"):
            runner(run)


def test_an_operator_that_does_not_end_is_left_alone(monkeypatch):
    """It blocks no caller. A run that ends well shortly after the deadline is no error."""
    monkeypatch.setattr(runtime.engines.onnx_runtime, "GRACE", 0.2)
    go, runner = threading.Event(), Runner("net", 0.3)
    start = time.monotonic()
    with pytest.raises(DeviceError, match=LATE):
        runner(lambda *_: go.wait(60))
    assert time.monotonic() - start < 10
    go.set()
    monkeypatch.setattr(runtime.engines.onnx_runtime, "GRACE", 60)
    runner = Runner("net", 0.3)
    assert runner(lambda options: time.sleep(0.5) or "done") == "done"
    assert runner(lambda: "directly") == "directly"


EXIT = """
import sys, threading, time
import numpy as np, onnxruntime
from runtime import OnnxEngine

begun, real = threading.Event(), onnxruntime.RunOptions
onnxruntime.RunOptions = lambda: (begun.set(), real())[1]
net = OnnxEngine(sys.stdin.buffer.read(), name="net", deadline_s=None)
threading.Thread(target=net, args=[np.ones(2, "f4")], daemon=True).start()
begun.wait()
time.sleep(0.3)
sys.exit(3)
"""


def test_a_first_run_ends_when_its_process_ends():
    """The run's caller is a daemon thread, and this thread prints no error."""
    done = subprocess.run(
        [sys.executable, "-c", EXIT],
        input=counting(trips=ENDLESS).SerializeToString(),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"")


INTERRUPTED = """
import os, signal, sys, threading
import onnxruntime
from sdk.__main__ import main

real = onnxruntime.RunOptions

def options():
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    return real()

signal.signal(signal.SIGINT, signal.default_int_handler)
onnxruntime.RunOptions = options
sys.exit(main(["predict", "picture.png", "--prior", "net.onnx", "-o", "out"]))
"""


def test_ctrl_c_ends_the_command_line(tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "picture.png"), np.zeros((16, 24, 3), np.uint8))
    model = counting((1, 3, 16, 24), trips=ENDLESS)
    helper.set_model_props(model, {"mean": "[0, 0, 0]", "std": "[1, 1, 1]"})
    onnx.save(model, tmp_path / "net.onnx")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 130 and "interrupted" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and time.monotonic() - start < 50
    assert not list(tmp_path.rglob("*labels*"))
