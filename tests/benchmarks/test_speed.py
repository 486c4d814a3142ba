"""The speed benchmarks: the peers compute the same, and the rows contain what was measured."""

import json
import math

import numpy as np
import pytest
from cases import case

import runtime
from benchmarks import __main__ as command
from benchmarks.speed import harness, ops, photo, step, worker, workloads
from runtime.errors import SdkError
from sdk.image import encode_image

pytest.importorskip("torch", reason="the benchmarks' peers need PyTorch")

SMALL = {
    "conv": ops.conv(9, 11, 20, 18, 3, False),
    "conv of few": ops.conv(9, 11, 5, 18, 3, False),
    "conv 1x1": ops.conv(9, 11, 20, 18, 1, False),
    "conv backward": ops.conv(9, 11, 20, 18, 3, True),
    "conv 1x1 backward": ops.conv(9, 11, 20, 18, 1, True),
    "cluster loss": ops.cluster_loss(9, 11, 18),
    "spatial loss": ops.spatial_loss(9, 11, 18),
    "guided": ops.guided(33, 39, 3),
    "fast guided": ops.guided(33, 39, 3, 4),
    "bilinear upsampling": ops.joint_upsample(24, 36, 5, 3),
}


def test_peers_of_an_operation_agree(monkeypatch):
    monkeypatch.setattr(ops, "KERNELS", 1e9)  # fewer repetitions
    for name, op in SMALL.items():
        monkeypatch.setitem(ops.OPS, name, op)
        checks = {}
        for who in op.peers:
            if who == "opencv" and "guided" in name:
                continue  # tests/rules/ximgproc.sh compares with it
            run, checks[who] = ops.peer(name, who, 1)
            with case(name, who):
                assert math.isfinite(run())
                assert ops.agree(checks[who], checks["ours"])


def test_operations_that_differ_do_not_agree(monkeypatch):
    guided = SMALL["guided"]

    def shifted(rng):
        guide, values = guided.make(rng)
        return guide, np.roll(values, 1, 0)

    monkeypatch.setitem(ops.OPS, "a", guided)
    monkeypatch.setitem(ops.OPS, "b", guided._replace(make=shifted))
    assert not ops.agree(ops.peer("a", "ours", 1)[1], ops.peer("b", "ours", 1)[1])


def test_peers_of_a_step_agree():
    """The first losses are equal, and a run returns no time: the caller measures it."""
    for name in ("residual 16x20", "dynaguide 16x20"):
        chosen = workloads.find_case(name)
        inputs = workloads.picture(chosen.height, chosen.width)
        _, first = worker.ours(chosen, 1, runtime.isa(), inputs)
        for how in ("eager", "channels-last"):
            run, loss = worker.torch(chosen, 1, how, inputs)
            with case(name, how):
                assert loss == pytest.approx(first, rel=1e-4) and run() is None


def test_find_case_refuses():
    for name in ("", "residual", "residual 8", "residual 0x8", "nothing 8x8"):
        with case(repr(name)), pytest.raises(ValueError):
            workloads.find_case(name)


def run(tmp_path, *arguments):
    """The JSON document of a benchmark."""
    out = tmp_path / "new" / "results.json"
    assert command.main([*arguments, "--repeats", "1", "-o", str(out)]) == 0
    return json.loads(out.read_text())


def test_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "TORCH", ("torch eager",))  # the others need half a minute
    name = "dynaguide 16x20"
    document = run(tmp_path, "step", "--cases", name, "--peers", "best,torch", "--threads", "1")
    rows = {r["who"].split()[0]: r for r in document["rows"]}
    assert list(rows) == ["ours", "torch", "matmul", "copy"]
    ours = rows["ours"]
    assert ours["ms/step"] > 0 and ours["x torch eager"] > 0 and len(ours["seconds"]) == 1
    expected = 1e9 * ours["seconds"][0] / workloads.find_case(name).steps / (16 * 20)
    assert ours["ns/pixel"] == pytest.approx(expected, abs=1)
    assert {r["case"] for r in document["rows"]} == {name}
    assert document["environment"]["commit"]
    assert f"| {name}" in capsys.readouterr().out


def test_a_row_for_each_case_and_number_of_threads(tmp_path, capsys, monkeypatch):
    """The commands step and ops, with made-up measurements instead of processes."""
    measured = []

    def measure(name, threads, repeats, *_):
        measured.append((name, threads, repeats))
        return [{"case": name, "threads": threads, "ms": 1.0, "seconds": [1e-3]}]

    monkeypatch.setattr(step, "measure", measure)
    names = ["residual 16x20", "dynaguide 16x20"]
    arguments = ("--cases", ",".join(names), "--peers", "best", "--threads", "1,2")
    rows = run(tmp_path, "step", *arguments)["rows"]
    assert [(r["case"], r["threads"]) for r in rows] == [(n, t) for t in (1, 2) for n in names]
    assert "| residual 16x20" in capsys.readouterr().out
    monkeypatch.setattr(ops, "measure", measure)
    rows = run(tmp_path, "ops", "--only", "guided filter, 1", "--threads", "2")["rows"]
    assert measured[4:] == [(r["case"], 2, 1) for r in rows] and len(rows) == 1


def test_ops(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "isas", lambda: [runtime.isa()])  # a process for one of them
    rows = run(tmp_path, "ops", "--only", "bilinear upsampling")["rows"]
    assert {r["who"].split()[0] for r in rows} == {"ours", "opencv", "matmul", "copy"}
    assert all(0 < r["ms"] and 0 <= r["of floor"] for r in rows if "ms" in r)


def test_photo(tmp_path, monkeypatch):
    pytest.importorskip("skimage", reason="the photo comes with scikit-image")
    monkeypatch.setattr(photo, "LONG_SIDE", 48)
    document = run(tmp_path, "photo", "--threads", "1")
    ours, eager, tuned = document["rows"]
    stages = [ours[f"{stage} ms"] for stage in ("start", "import", "load", "segment")]
    assert ours["first ms"] == pytest.approx(sum(stages), abs=3)
    assert max(document["size"]) == 48 and ours["without prior ms"] < ours["steady ms"]
    assert eager["steps"] == tuned["steps"] == 1000
    assert eager["without prior ms"] == pytest.approx(1e6 * eager["two steps, s"][0] / 2, abs=1)


def test_bad_input_is_one_error(capsys):
    for arguments, message in (
        (("step", "--cases", "x"), "case 'x' is unknown"),
        (("step", "--peers", "x"), "peer 'x' is unknown"),
        (("ops", "--only", "x-ray"), "no operation's name contains 'x-ray'"),
        (("ops", "--threads", "100000"), "wanted 1 to 256"),
        (("step", "--repeats", "0"), "repeats is 0"),
        (("photo", "--picture", "none.jpg"), "none.jpg"),
    ):
        with case(*arguments):
            assert command.main(list(arguments)) == 1
            error = capsys.readouterr().err
            assert message in error and "Traceback" not in error


def test_usage_errors(capsys):
    for arguments in (
        ("step", "--threads", "0x"),
        ("photo", "--threads=-1"),
        ("ops", "-o", ""),
        ("photo", "--threads", "257"),
    ):
        with case(*arguments):
            with pytest.raises(SystemExit, match="2"):
                command.main(list(arguments))
            assert "wanted" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments in (("step", "--peers", "best"), ("ops", "--only", "bilinear"), ("photo",)):
        for out in (tmp_path, tmp_path / "file" / "x.json"):
            with case(*arguments, out):
                assert command.main([*arguments, "-o", str(out)]) == 1
                error = capsys.readouterr().err
                assert error.startswith("error: ") and str(out) in error
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_peers_that_do_not_start_are_named(capsys):
    assert command.main(["step", "--peers", "best", "--cases", "residual 99999999x99999999"]) == 1
    error = capsys.readouterr().err
    assert "left out: ours" in error and "error: nothing to compare" in error


def test_a_peer_that_dies_is_named():
    (one,) = harness.start(["matmul"], "residual 8x8", 1)
    one.process.kill()
    with pytest.raises(SdkError, match="matmul ended: it was killed"):
        harness.rounds([one], 1)


def test_a_prior_that_fails_is_one_error_with_its_cause(monkeypatch, capsys, tmp_path):
    picture = np.zeros((20, 30, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(encode_image(picture, ".png"))
    arguments = ["photo", "--picture", str(tmp_path / "a.png"), "--threads", "1"]
    assert command.main([*arguments, "--priors", "none.onnx"]) == 1
    assert "none.onnx does not exist; fix: " in capsys.readouterr().err
