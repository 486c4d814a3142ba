"""The TensorRT engine on stand-ins for its packages: right answers, and every refusal noticed."""

import sys

import fake_tensorrt
import numpy as np
import pytest
from cases import case

from runtime.engines import tensorrt, tensorrt_engine
from runtime.engines.tensorrt_engine import OutputWarning, TensorRTEngine
from runtime.errors import BundleError, DeviceError, EngineMismatch, InputError, MissingBackend

SCORES = {"image": ([1, 3, 8, 16], "FLOAT")}, {"scores": ([1, 2, 8, 16], "FLOAT")}
FREE = {"image": ([1, 3, -1, -1], "FLOAT")}, {"scores": ([1, 2, -1, -1], "FLOAT")}
PROFILE = {"image": ([1, 3, 8, 8], [1, 3, 8, 16], [1, 3, 32, 32])}
STEP = (
    {"gain": ([2], "FLOAT"), "parameters": ([4], "FLOAT"), "momenta": ([4], "FLOAT")},
    {
        "parameters_out": ([4], "FLOAT"),
        "momenta_out": ([4], "FLOAT"),
        "losses": ([2], "FLOAT"),
    },
)


def channels(inputs):
    """Scores: the first two channels."""
    return {"scores": inputs["image"][:, :2]}


def descend(inputs):
    momenta = 0.5 * inputs["momenta"] + inputs["gain"][0]
    parameters = inputs["parameters"] - momenta
    return {
        "parameters_out": parameters,
        "momenta_out": momenta,
        "losses": [parameters.sum(), momenta.sum()],
    }


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake_tensorrt.install(monkeypatch, functions={"channels": channels, "descend": descend})


def picture(rng, *shape):
    return rng.standard_normal(shape or (1, 3, 8, 16), dtype=np.float32)


def scorer(**options):
    return TensorRTEngine(fake_tensorrt.plan("channels", *SCORES), runtime="tensorrt", **options)


def resizer(**options):
    data = fake_tensorrt.plan("channels", *FREE, PROFILE)
    return TensorRTEngine(data, runtime="tensorrt", **options)


def stepper(**options):
    return TensorRTEngine(fake_tensorrt.plan("descend", *STEP), runtime="tensorrt", **options)


def test_runs_and_describes_itself(fake, rng):
    with scorer(name="prior") as engine:
        assert engine.inputs == [("image", (1, 3, 8, 16), "tensor(float)")]
        assert engine.outputs == [("scores", (1, 2, 8, 16), "tensor(float)")]
        assert engine.metadata == {} and not engine.warnings
        for _ in range(4):
            image = picture(rng)
            (scores,) = engine(image)
            np.testing.assert_array_equal(scores, image[:, :2])
        kept = scores.copy()
        engine(picture(rng))
        np.testing.assert_array_equal(scores, kept)  # a result is the caller's
    assert fake.contexts == 0 and fake.blocks == {} and fake.graphs == {}


def test_contexts_and_buffers_are_made_once(fake, rng):
    engine = scorer()
    for _ in range(5):
        engine(picture(rng))
    assert fake.calls["create_execution_context"] == 1
    assert fake.calls["mem_alloc"] == 2


def test_converts_numbers_but_not_kinds(fake):
    engine = scorer()
    (scores,) = engine(np.arange(384, dtype=np.float64).reshape(1, 3, 8, 16))
    assert scores.dtype == np.float32 and scores[0, 1, 0, 0] == 128
    with pytest.raises(InputError, match="'image' of the engine is complex128; wanted float32"):
        engine(np.zeros((1, 3, 8, 16), complex))


def test_captures_a_graph_after_one_plain_run(fake, rng):
    engine = scorer()
    assert engine.graph == "not yet"
    engine(picture(rng))
    assert engine.graph == "not yet" and fake.calls["cuStreamBeginCapture_v2"] == 0
    for _ in range(3):
        image = picture(rng)
        np.testing.assert_array_equal(engine(image)[0], image[:, :2])
    assert engine.graph == "captured"
    assert fake.calls["execute_async_v3"] == 2 and fake.calls["cuGraphLaunch"] == 3


def test_without_a_graph_it_runs_plainly_and_says_so(fake, rng):
    for codes, reason in [
        ({"cuStreamBeginCapture_v2": 900}, "cuStreamBeginCapture_v2 gives 900"),
        ({"cuGraphInstantiateWithFlags": 1}, "cuGraphInstantiateWithFlags gives 1"),
        ({"cuGraphInstantiateWithFlags": "absent"}, "undefined symbol"),
    ]:
        with case(reason):
            fake.codes = codes
            engine = scorer()
            for _ in range(3):
                image = picture(rng)
                np.testing.assert_array_equal(engine(image)[0], image[:, :2])
            assert engine.graph.startswith("plain: ") and reason in engine.graph
            assert fake.calls["cuGraphLaunch"] == 0
            engine.close()
            assert fake.graphs == {}


def test_a_run_that_cannot_be_captured_runs_plainly(fake, rng):
    engine = scorer()
    engine(picture(rng))
    fake.refuse.add("execute_async_v3")
    with pytest.raises(DeviceError, match="the run was refused"):
        engine(picture(rng))
    assert engine.graph == "plain: the run cannot be captured" and fake.graphs == {}


def test_no_driver_library_for_graphs(fake, rng):
    engine = scorer()
    engine(picture(rng))
    fake.no_driver = True
    engine(picture(rng))
    assert "cannot open shared object file" in engine.graph


def test_a_refused_graph_replays_nothing(fake, rng):
    engine = scorer()
    engine(picture(rng))
    fake.codes["cuGraphLaunch"] = 700
    with pytest.raises(DeviceError, match="CUDA graph was refused with code 700"):
        engine(picture(rng))
    with pytest.raises(DeviceError, match="cannot be used any more: the CUDA graph"):
        engine(picture(rng))


def test_rtx_captures_by_itself(fake, rng):
    data = fake_tensorrt.plan("channels", *SCORES)
    with TensorRTEngine(data, runtime="tensorrt_rtx") as engine:
        for _ in range(3):
            engine(picture(rng))
        assert engine.graph == "by the runtime"
        (session,) = engine._sessions.values()
        assert session.contexts[0].config.cuda_graph_strategy == "whole"
    assert fake.calls["cuStreamBeginCapture_v2"] == 0


# Shapes


def test_free_shapes_get_a_context_each(fake, rng):
    with resizer() as engine:
        assert engine.inputs[0].shape == (1, 3, None, None)
        for height, width in ((8, 8), (32, 16), (8, 8), (32, 16)):
            image = picture(rng, 1, 3, height, width)
            np.testing.assert_array_equal(engine(image)[0], image[:, :2])
        assert fake.calls["create_execution_context"] == 2
        for width in range(9, 20):
            for _ in range(2):
                engine(picture(rng, 1, 3, 8, width))
        assert len(fake.blocks) == len(fake.graphs) == 2 * tensorrt_engine.MOST_SESSIONS
    assert fake.blocks == {}


def test_shapes_are_checked_before_anything_runs(fake, rng):
    for shape, wanted in [
        (
            (1, 3, 7, 8),
            r"\(1, 3, 7, 8\); it takes \(1, 3, 8, 8\) to \(1, 3, 32, 32\)\n  fix: resize",
        ),
        ((1, 3, 8, 33), r"it takes \(1, 3, 8, 8\) to"),
        ((3, 8, 8), r"has shape \(3, 8, 8\)"),
    ]:
        with case(shape):
            engine = resizer()
            with pytest.raises(InputError, match=wanted):
                engine(picture(rng, *shape))
            assert fake.calls["set_input_shape"] == 0
            engine(picture(rng, 1, 3, 8, 8))  # it is not dead
            engine.close()
            fake.calls.clear()


def test_a_fixed_shape_names_itself(fake, rng):
    with pytest.raises(InputError, match=r"\(1, 3, 8, 8\); it takes \(1, 3, 8, 16\)\n"):
        scorer()(picture(rng, 1, 3, 8, 8))


def test_the_number_of_arrays(fake):
    with pytest.raises(InputError, match="got 0 arrays; wanted image"):
        scorer()()


def test_an_output_without_a_shape(fake, rng):
    fake.refuse.add("output_shape")
    with pytest.raises(DeviceError, match="'scores' of the engine has no fixed shape"):
        resizer()(picture(rng))
    assert fake.blocks == {}


def test_a_type_that_numpy_has_not(fake):
    data = fake_tensorrt.plan("channels", {"image": ([1], "BF16")}, {})
    with pytest.raises(
        BundleError, match="image of the engine is BF16, a type that NumPy does not have"
    ):
        TensorRTEngine(data, runtime="tensorrt")


# Refusals of the device


def test_refused_calls_are_noticed(fake, rng):
    for call, message in [
        ("set_input_shape", r"refuses shape \(1, 3, 8, 16\) for 'image'"),
        ("set_tensor_address", "refuses a buffer for 'image'"),
        ("create_execution_context", r"makes no execution context GPU 0 \(1 of 2 MiB free\)"),
    ]:
        with case(call):
            engine = scorer()
            fake.refuse.add(call)
            with pytest.raises(DeviceError, match=message) as caught:
                engine(picture(rng))
            assert caught.tb  # which keeps the engine's frames alive
            assert fake.contexts == 0 and fake.blocks == {}
            fake.refuse.clear()
            engine(picture(rng))
            engine.close()


def test_a_refused_run_is_the_last(fake, rng):
    engine = scorer(name="prior")
    fake.refuse.add("execute_async_v3")
    with pytest.raises(DeviceError, match="prior: the run was refused"):
        engine(picture(rng))
    fake.refuse.clear()
    with pytest.raises(DeviceError, match="prior cannot be used any more: the run was refused"):
        engine(picture(rng))
    engine.close()
    assert fake.blocks == {} and fake.contexts == 0


def test_a_failing_gpu_is_the_last(fake, rng):
    engine = scorer()
    fake.raises = fake_tensorrt.CudaError("cuMemcpyHtoDAsync failed: an illegal memory access")
    with pytest.raises(DeviceError, match="the GPU fails: cuMemcpyHtoDAsync failed"):
        engine(picture(rng))
    fake.raises = None
    with pytest.raises(DeviceError, match="any more: the GPU fails"):
        engine(picture(rng))


def test_too_little_memory_is_named(fake, rng):
    engine = scorer()
    fake.memory = 2000  # the image takes 1536 bytes, the scores 1024
    with pytest.raises(DeviceError, match=r"does not fit GPU 0 .* free\): cuMemAlloc failed"):
        engine(picture(rng))
    assert fake.blocks == {}
    fake.memory = 2**20
    engine(picture(rng))


def test_a_hung_gpu_is_not_waited_for(fake, rng, monkeypatch):
    monkeypatch.setattr(tensorrt_engine, "_HUNG", [])
    engine = scorer(timeout_s=0.05)
    fake.hang = True
    with pytest.raises(DeviceError, match=r"the GPU has not answered for 0\.05 s"):
        engine(picture(rng))
    with pytest.raises(DeviceError, match="any more: the GPU has not answered"):
        engine(picture(rng))
    engine.close()
    assert len(fake.blocks) == 2  # freeing them would wait for the GPU
    assert fake.contexts == 0


def test_close_is_final_and_can_be_repeated(fake, rng):
    engine = scorer(name="prior")
    engine(picture(rng))
    engine.close()
    engine.close()
    assert fake.blocks == {} and fake.contexts == 0
    with pytest.raises(DeviceError, match="prior is closed"):
        engine(picture(rng))


# Plans that do not fit


def test_another_version(fake):
    with pytest.raises(
        EngineMismatch, match=r"built with tensorrt 10\.7\.0\.23; .* loaded 10\.3\.0"
    ):
        scorer(version="10.7.0.23")
    assert fake.calls["deserialize"] == 0
    scorer(version="10.3.0.30").close()


def test_another_version_in_the_header(fake):
    data = b"vtrt" + bytes(12) + (28).to_bytes(8, "little") + bytes([1, 6, 0, 9])
    with pytest.raises(EngineMismatch, match=r"1\.6\.0\.9; .*\n  fix: python -m runtime build"):
        TensorRTEngine(data, runtime="tensorrt_rtx")


def test_another_device(fake):
    fake.capabilities = [(7, 5), (8, 7)]
    with pytest.raises(
        EngineMismatch, match=r"for .* 8\.7; GPU 0 \(.* 0\) has 7\.5\n.*'cuda:1', or"
    ):
        scorer(compute_capabilities=["8.7"])
    with pytest.raises(EngineMismatch, match=r"9\.0; .* fix: python -m runtime build|9\.0"):
        scorer(compute_capabilities=["9.0"])
    scorer(compute_capabilities=["8.6", "8.7"], device=1).close()
    with pytest.raises(InputError, match="device is 2; wanted 0 to 1"):
        scorer(device=2)


def test_a_plan_that_is_refused_is_no_engine(fake):
    for says, error, message in [
        ("Version tag does not match. Current 239, serialized 240", EngineMismatch, "another vers"),
        ("expecting compute 8.6 got compute 7.5", EngineMismatch, "another version or device"),
        ("Error Code 2: OutOfMemory", DeviceError, "does not fit GPU 0"),
        ("magicTag == rtMagicTag failed", BundleError, "no engine that TensorRT 10.3.0 can load"),
    ]:
        with case(says):
            fake.refuse, fake.says = {"deserialize"}, says
            with pytest.raises(error, match=message) as caught:
                scorer()
            assert says in str(caught.value)
            assert fake.contexts == 0


OLD_DRIVER = "CUDA initialization failure with error: 35. Please check your CUDA installation"


def test_a_library_that_cannot_start_is_a_device_error(fake, monkeypatch, tmp_path):
    """The binding raises a TypeError for the null pointer of createInferRuntime."""
    fake.refuse, fake.says = {"Runtime"}, OLD_DRIVER
    file = str(tmp_path / "tensorrt" / "__init__.py")
    monkeypatch.setattr(sys.modules["tensorrt"], "__file__", file, raising=False)

    def raised(driver, *wheels, problem=None):
        for wheel in wheels:
            (tmp_path / f"{wheel}-11.4.0.106.dist-info").mkdir()
        monkeypatch.setattr(tensorrt, "cuda_driver_version", lambda: driver)
        monkeypatch.setattr(tensorrt, "cuda_problem", lambda: problem)
        with pytest.raises(DeviceError) as caught:
            scorer()
        assert fake.contexts == 0
        return caught.value.message, caught.value.fix

    message, fix = raised("12.4")
    assert message.startswith("tensorrt 10.3.0 does not start: it makes no Runtime, and its log ")
    assert OLD_DRIVER in message and "factory function returned nullptr" in message
    ends = (
        "nullptr); error 35 means that the driver is missing or too old; the driver runs CUDA 12.4"
    )
    assert message.endswith(ends) and fix == "update NVIDIA's driver"
    message, fix = raised("12.4", "tensorrt", "tensorrt_cu13", "tensorrt_cu13_libs", "cuda_cu12")
    assert message.endswith("; the driver runs CUDA 12.4; tensorrt was built for CUDA 13")
    assert "pip uninstall -y tensorrt tensorrt-cu13 tensorrt-cu13-libs;" in fix
    assert fix.endswith("pip install 'tensorrt-cu12>=10.3,<12'")
    absent = MissingBackend("no CUDA driver: gone", fix="install NVIDIA's driver")
    message, fix = raised(None, problem=absent)
    assert message.endswith(
        "; this machine has no CUDA driver: gone; tensorrt was built for CUDA 13"
    )
    assert fix == "install NVIDIA's driver"
    restart = DeviceError("the CUDA driver does not start: cuInit returns 803", fix="restart")
    assert "; the CUDA driver does not start: cuInit" in raised("13.0", problem=restart)[0]
    assert raised("13.0", problem=restart)[1] == "restart"
    # A module without a folder of its own lies beside its wheels, too.
    monkeypatch.setattr(sys.modules["tensorrt"], "__file__", str(tmp_path / "tensorrt.py"))
    fake.says = "CUDA initialization failure with error: 2"
    message, fix = raised("13.0")
    assert message.endswith(
        "(pybind11::init(): factory function returned nullptr); the driver "
        "runs CUDA 13.0; tensorrt was built for CUDA 13"
    )
    assert fix.startswith("close what else uses the GPU")
    assert raised("12.4", "tensorrt_cu12")[0].endswith("; the driver runs CUDA 12.4")


def test_missing_packages(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(MissingBackend, match=r"PyCUDA is needed(.|\n)*fix: pip install pycuda"):
        scorer()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingBackend, match=r"tensorrt is needed(.|\n)*dynaguide-edge\[trt\]"):
        scorer()


def test_no_driver(fake):
    fake.no_driver = True
    with pytest.raises(MissingBackend, match="PyCUDA does not start: cuInit failed"):
        scorer()


# The guard


def test_nan_is_a_warning_not_an_error(fake, rng):
    fake.functions["channels"] = lambda inputs: {
        "scores": np.where(inputs["image"][:, :2] > 0, np.nan, 1)
    }
    engine, image = scorer(), picture(rng)
    (scores,) = engine(image)
    count = int((image[:, :2] > 0).sum())
    assert np.isnan(scores).sum() == count
    assert list(engine.warnings) == [
        OutputWarning("scores", f"{count} of 256 values are NaN or infinite")
    ]
    for _ in range(100):
        engine(image)
    assert len(engine.warnings) == 64


def test_one_class_everywhere_is_a_warning(fake, rng):
    engine, image = scorer(), picture(rng)
    image[0, 1] = image[0, 0] - 1
    engine(image)
    assert [w.message for w in engine.warnings] == ["one class covers the whole picture"]
    image[0, 1, 3, 5] += 2  # one other pixel, which a coarse look misses
    engine(image)
    assert len(engine.warnings) == 1


def test_labels_are_guarded(fake):
    fake.functions["labels"] = lambda inputs: {"labels": inputs["image"][:, 0].astype(np.int32)}
    data = fake_tensorrt.plan("labels", SCORES[0], {"labels": ([1, 8, 16], "INT32")})
    engine = TensorRTEngine(data, runtime="tensorrt")
    (labels,) = engine(np.arange(384).reshape(1, 3, 8, 16))
    assert labels.dtype == np.int32 and labels[0, 7, 15] == 127 and not engine.warnings
    engine(np.full((1, 3, 8, 16), 7))
    assert engine.warnings[0].output == "labels"


# The loop


def start(gain=1.0):
    feed = {"gain": np.array([gain, 0], np.float32)}
    state = {
        "parameters": ("parameters_out", np.arange(4, dtype=np.float32)),
        "momenta": ("momenta_out", np.zeros(4, np.float32)),
    }
    return feed, state


def expected(gains):
    inputs = {"parameters": np.arange(4, dtype=np.float32), "momenta": np.zeros(4, np.float32)}
    for gain in gains:
        out = descend({**inputs, "gain": [np.float32(gain)]})
        inputs = {"parameters": out["parameters_out"], "momenta": out["momenta_out"]}
    return inputs


def assert_state(loop, gains):
    state, wanted = loop.state(), expected(gains)
    assert list(state) == ["parameters", "momenta"]
    for name, value in state.items():
        np.testing.assert_array_equal(value, wanted[name])


def test_loop_keeps_its_state_on_the_device(fake):
    with stepper() as engine:
        loop = engine.loop(*start())
        copies = fake.calls["htod"]
        for steps in range(1, 9):  # the ring of three comes round twice, plain and captured
            out = loop.step()
            assert list(out) == ["losses"]
            assert out["losses"][0] == expected([1] * steps)["parameters"].sum()
            assert_state(loop, [1] * steps)
        assert fake.calls["htod"] == copies
        assert fake.calls["execute_async_v3"] == 6  # three plain runs, three captures
        assert fake.calls["cuGraphLaunch"] == 5 and engine.graph == "captured"
        assert len(fake.blocks) == 3 + 3 + 1 + 1
    assert fake.blocks == {} and fake.graphs == {}


def test_loop_takes_changes_that_stay(fake):
    loop = stepper().loop(*start())
    loop.step()
    loop.step(gain=np.array([5, 0]))
    loop.step()
    assert_state(loop, [1, 5, 5])


def test_loop_undoes_two_steps(fake):
    loop = stepper().loop(*start())
    with pytest.raises(InputError, match="n is 1; 0 steps can be undone"):
        loop.undo()
    for _ in range(4):
        loop.step()
    loop.undo(2)
    assert_state(loop, [1, 1])
    with pytest.raises(InputError, match="n is 1; 0 steps"):
        loop.undo()
    loop.step(gain=np.array([3, 0]))
    assert_state(loop, [1, 1, 3])
    loop.undo()
    assert_state(loop, [1, 1])
    loop.undo(0)
    assert_state(loop, [1, 1])
    with pytest.raises(InputError, match="n is -1; "):
        loop.undo(-1)


def test_a_new_loop_starts_again_and_ends_the_old_one(fake):
    with stepper() as engine:
        old = engine.loop(*start())
        old.step()
        new = engine.loop(*start(gain=2))
        assert fake.calls["create_execution_context"] == 3  # the same contexts and buffers
        with pytest.raises(DeviceError, match="this loop has ended"):
            old.step()
        with pytest.raises(DeviceError, match="this loop has ended"):
            old.state()
        new.step()
        assert_state(new, [2])
    with pytest.raises(DeviceError, match="this loop has ended"):
        new.step()


def test_loop_refuses_what_does_not_fit(fake):
    engine = stepper()
    feed, state = start()
    with pytest.raises(InputError, match=r"wanted each of \['gain', 'momenta', 'parameters'\]"):
        engine.loop({}, state)
    with pytest.raises(InputError, match="outputs among"):
        engine.loop(feed, {**state, "momenta": ("nothing", state["momenta"][1])})
    with pytest.raises(InputError, match=r"'losses' \(2,\) float32 cannot become input 'momenta'"):
        engine.loop(feed, {**state, "momenta": ("losses", state["momenta"][1])})
    loop = engine.loop(feed, state)
    with pytest.raises(InputError, match=r"'gain' of shape \(3,\) cannot be changed"):
        loop.step(gain=np.zeros(3))
    with pytest.raises(InputError, match=r"'momenta' of shape \(4,\) .* wanted gain \(2,\)"):
        loop.step(momenta=np.zeros(4))


def test_loop_guards_its_losses(fake):
    engine = stepper()
    engine.loop(*start(gain=np.inf)).step()
    assert engine.warnings[0] == OutputWarning("losses", "2 of 2 values are NaN or infinite")


def test_loop_notices_a_refused_run(fake):
    loop = stepper().loop(*start())
    fake.refuse.add("execute_async_v3")
    with pytest.raises(DeviceError, match="the run was refused"):
        loop.step()
    with pytest.raises(DeviceError, match="any more"):
        loop.state()
