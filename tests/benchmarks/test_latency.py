"""The profiler: what a row counts, what it writes, what it refuses."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks import __main__ as command
from benchmarks import compare, latency, page, peers, report
from benchmarks import document as documents
from runtime.errors import InputError, MissingBackend
from sdk import RefineConfig
from sdk.image import encode_image

PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
HERE = Path(__file__).parents[1]


class Fake:
    """A segmenter that takes 5 ms, or what ``slow`` says for a picture's number."""

    def __init__(self, slow=()):
        self.calls, self.slow = 0, dict(slow)

    def __call__(self, picture):
        begin = time.perf_counter()
        time.sleep(self.slow.get(self.calls, 0.005))
        self.calls += 1
        spent = 1e3 * (time.perf_counter() - begin)
        timings = {"prior": 1.0, "refine": spent - 1, "unaccounted": 0.0, "total": spent}
        return types.SimpleNamespace(timings=timings, stats={"steps": 4})


def row(mode="back-to-back", **more):
    return latency.Row(mode, 4, 1, **more)


@pytest.fixture
def clock(monkeypatch):
    """A clock that sleeping moves on at once, and each look at it by a microsecond."""
    now = [0.0]

    def look():
        now[0] += 1e-6
        return now[0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", look)
    monkeypatch.setattr(time, "sleep", sleep)


def quiet(_):
    pass


def test_a_late_picture_is_counted_and_its_wait_too(clock):
    made = row("paced", rate=20)
    latency.paced(made, Fake({10: 0.12}), [PICTURE], 1.0, quiet)
    times = made.total_ms
    assert len(times) == 20 and made.unserved == 0
    assert times[10] >= 120
    assert times[11] >= times[10] - 50 + 4.9 and times[12] >= times[11] - 50 + 4.9  # they waited
    assert made.late == sum(t > 50 for t in times) >= 2
    assert made.stages_ms["queue"][11] >= 69 > 50 > np.median(times)
    np.testing.assert_allclose(made.start_s, np.arange(20) / 20)  # when they were due
    np.testing.assert_allclose(np.sum(list(made.stages_ms.values()), 0), times)


def test_a_rate_that_is_too_high_is_said(clock):
    made = row("paced", rate=100)
    latency.paced(made, Fake(dict.fromkeys(range(1000), 0.05)), [PICTURE], 0.5, quiet)
    assert 9 <= len(made.total_ms) <= 11 and made.unserved == 50 - len(made.total_ms)
    found = latency.summarise(made, [50.0])
    assert any("100/s is more than it can do" in r for r in found["summary"]["unstable"])


def test_back_to_back_leaves_nothing_out(clock):
    made, fake = row(), Fake({7: 0.1})
    latency.back_to_back(made, fake, [PICTURE], 0.5, quiet)
    assert len(made.total_ms) == fake.calls and made.total_ms[7] > 100
    found = latency.summarise(made, [50.0, 99.0])
    assert 7 in [o["index"] for o in found["summary"]["outliers"]]
    assert found["summary"]["max"] == max(made.total_ms)
    assert found["stage_p50_ms"]["refine per step"] == pytest.approx(
        np.median(made.stages_ms["refine"]) / 4
    )
    assert found["summary"]["percentiles"]["p99"]["value"] is None
    json.dumps(found)


def test_words_numbers_and_sizes():
    assert latency.numbers("50,99,50", "percentile", 1, 99.99) == [50, 99]
    assert latency.size_of("480x640") == (480, 640)
    for wrong in ("", "a", "0", "50,,60", "nan"):
        with pytest.raises(InputError, match="percentile is"):
            latency.numbers(wrong, "percentile", 1, 99.99)
    for wrong in ("480", "0x5", "4x4x4", "ax5", "-1x5"):
        with pytest.raises(InputError, match="imgsz is"):
            latency.size_of(wrong)
    with pytest.raises(InputError, match="mode is 'fast'"):
        latency.words("paced,fast", "mode", latency.MODES)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--picture", "a.png", "--video", "b.mp4"], "both given"),
        (["--mode", "paced"], "paced needs a rate"),
        (["--mode", ""], "mode is ''"),
        (["--mode", "foo"], "mode is 'foo'"),
        (["--refine", "1.5"], "whole numbers of steps"),
        (["--refine", "0,x"], "refine is '0,x'"),
        (["--refine=-1"], "refine is '-1'"),
        (["--rate", "0"], "--rate: it is '0'"),
        (["--duration", "nan"], "--duration: it is 'nan'"),
        (["--duration=-1"], "--duration: it is '-1'"),
        (["--percentile", "50,200"], "percentile is '50,200'"),
        (["--imgsz", "5"], "imgsz is '5'"),
        (["--peer", "yolo"], "peer is 'yolo'"),
        (["--export", "pdf"], "export is 'pdf'"),
        (["--labels", "x.png"], "need the --picture"),
        (["--preset", "nothing"], "nothing"),
        (["--threads", "0"], "threads"),
        (["-o", ""], "it is empty; wanted a path"),
        (["--rate", "9", "--mode", "stream"], "--rate is for --mode paced"),
        (["--export", "json"], "--export needs a folder"),
        (["--peer", "torch-eager", "--refine", "0"], "nothing to do in 0 steps"),
        (["--scale", "1.5"], "--scale: it is '1.5'"),
        (["--scale", "0.5", "--refine", "0"], "--scale is for the native refinement"),
        (["--device", "foo"], "device is 'foo'"),
        (["--imgsz", "99999x99999"], "up to 16384"),
        (["--durations", "1"], "did you mean --duration?"),
    ],
)
def test_bad_options_are_usage_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["latency", *argv])
    told = capsys.readouterr()
    assert end.value.code == 2 and message in told.err and not told.out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--picture", "none.png"], "none.png"),
        (["--video", "none.mp4"], "none.mp4 does not exist"),
        (["nothing.onnx"], "nothing.onnx"),
        (["nothing"], "which does not exist"),
        (["--refine", ",".join(map(str, range(60)))], "these are 120 rows; wanted at most 100"),
        (["--picture", "tests/test_latency.py", "--labels", "none.png"], "test_latency.py"),
    ],
)
def test_files_that_are_missing_are_named(argv, message, capsys):
    assert command.main(["latency", *argv]) == 1
    told = capsys.readouterr()
    assert message in told.err and not told.out and "Traceback" not in told.err


def test_a_folder_that_is_no_bundle_is_not_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "large").write_text("large")
    monkeypatch.setattr(latency, "measure", None)
    monkeypatch.setattr(Path, "read_bytes", None)
    assert command.main(["latency", str(tmp_path)]) == 5
    assert "is no bundle: it has no manifest.json" in capsys.readouterr().err


def test_a_model_is_known_by_its_hash(tmp_path):
    from bundles import tiny_bundle

    (tmp_path / "x.onnx").write_bytes(b"abc")
    assert latency.hashes(str(tmp_path / "x.onnx")) == {
        "x.onnx": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }
    tiny_bundle(tmp_path / "a.bundle", with_network=False)
    (found,) = latency.hashes(str(tmp_path / "a.bundle")).items()
    (tmp_path / "a.bundle" / "notes.txt").write_text("not the bundle's")
    assert latency.hashes(str(tmp_path / "a.bundle")) == dict([found])
    assert found[0] == "a.bundle/manifest.json" and len(found[1]) == 64
    assert latency.hashes("kmeans") == {}


def test_peers_are_medians_that_were_measured(monkeypatch):
    """Of four turns the second median is told, not the mean of the two in the middle."""
    monkeypatch.setattr(peers, "PAUSE", 0.0)
    monkeypatch.setattr(peers, "TURNS", 4)
    now, spent = (
        [0.0],
        {"ours": [9, 0.001, 0.002, 0.004, 0.008], "theirs": [9, 0.01, 0.01, 0.01, 0.01]},
    )

    def run(name):
        now[0] += spent[name].pop(0)

    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    found = peers.in_turns(lambda: run("ours"), lambda: run("theirs"), 0.0)
    assert found["ours p50 ms"] == 2 and found["peer p50 ms"] == 10 and found["turns"] == 4
    assert found["peer / ours, median of the turns"] == "2.50"
    np.testing.assert_allclose(found["samples"]["ours_ms"], [1, 2, 4, 8])


@pytest.mark.parametrize("name", ["scipy", "matplotlib"])
def test_missing_packages_are_named_before_measuring(monkeypatch, capsys, tmp_path, name):
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(latency, "measure", None)
    assert command.main(["latency", "-o", str(tmp_path)]) == 4
    assert f"needs {name}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with all exports of a short run."""
    folder = tmp_path_factory.mktemp("latency")
    (folder / "picture.png").write_bytes(encode_image(PICTURE, ".png"))
    argv = ["latency", "--picture", str(folder / "picture.png"), "--refine", "0,2", "--rate", "20"]
    argv += ["--duration", "0.7", "--threads", "1", "--percentile", "50,90", "-o", str(folder)]
    assert command.main(argv) == 0
    return folder


def test_the_document_holds_what_was_measured(measured):
    document = documents.load(measured / "latency.json")
    names = [r["name"] for r in document["rows"]]
    assert len(names) == 6 and names[1] == "paced 20/s, 0 steps, 1 thread"
    assert not document["partial"] and document["picture"] == [48, 64, 1]
    assert {"cpu", "commit", "before", "after", "governors"} <= set(document["environment"])
    assert document["environment"]["before"]["load_average"] is not None
    for found in document["rows"]:
        n = found["summary"]["n"]
        stages = found["stages_ms"]
        assert n == len(found["total_ms"]) == len(found["start_s"]) > 0
        np.testing.assert_allclose(
            np.sum([v for v in stages.values()], 0), found["total_ms"], rtol=1e-9
        )
        assert np.min(np.divide(stages["unaccounted"], found["total_ms"])) < 0.2
        assert set(found["steps_done"]) == {found["steps"]}
        assert found["load_ms"] >= 0 and found["first_ms"] > 0
        assert found["quality"] == {"what": "not measured"}
    shortest = min(r["stage_p50_ms"]["decode"] for r in document["rows"] if r["mode"] != "stream")
    told = document["overhead"]
    assert 0 < told["ms_a_stage"] < 0.1 and told["of"].startswith("decode")
    assert told["share"] == pytest.approx(told["ms_a_stage"] / shortest)


def test_a_run_on_a_gpu_has_two_clocks(cuda, tmp_path):
    """The kernels run on the host here: its times stand in for a GPU's."""
    (tmp_path / "picture.png").write_bytes(encode_image(PICTURE, ".png"))
    argv = ["latency", "--picture", str(tmp_path / "picture.png"), "--refine", "0,1"]
    argv += ["--device", "cuda", "--duration", "0.5", "--threads", "1", "-o", str(tmp_path)]
    assert command.main(argv) == 0
    document = documents.load(tmp_path / "latency.json")
    assert document["device_time"].startswith("device time: CUDA events around preprocess")
    plain, refined = (r for r in document["rows"] if r["mode"] == "back-to-back")
    assert set(plain["device_ms"]) == {"preprocess", "filter"}
    assert set(refined["device_ms"]) == {"preprocess", "refine", "filter"}
    for stage, times in refined["device_ms"].items():
        assert len(times) == refined["summary"]["n"]
        assert 0 < refined["stage_p50_ms"][f"{stage}, device time"] <= max(times)
        assert (np.array(times) <= refined["stages_ms"][stage]).all()
    assert "refine, device time" in (tmp_path / "latency.md").read_text()


def test_csv_markdown_and_trace(measured):
    rows = list(csv.DictReader((measured / "latency.csv").open()))
    document = json.loads((measured / "latency.json").read_text())
    assert [r["mode"] for r in rows] == [r["mode"] for r in document["rows"]]
    assert {r["clock"] for r in rows} == {"end-to-end wall"}
    told = [r["summary"]["percentiles"]["p50"]["value"] for r in document["rows"]]
    assert [float(r["p50_ms"]) if r["p50_ms"] else None for r in rows] == told
    assert any(told)  # a slow machine has too few samples for some
    text = (measured / "latency.md").read_text()
    assert "end-to-end wall time" in text and "| p90 ms" in text
    trace = json.loads((measured / "trace.json").read_text())["traceEvents"]
    for pid in range(1, 7):  # complete events of a thread nest
        ends = [(e["ts"], e["ts"] + e["dur"]) for e in trace
                if e["pid"] == pid and e["name"] == "picture"]  # fmt: skip
        assert all(b[0] >= a[1] - 1 for a, b in pairwise(ends))
    waits = [e for e in trace if e["name"] == "queue"]
    assert len(waits) == 2 * sum(r["summary"]["n"] for r in document["rows"] if r["rate"])
    whole = [e for e in trace if e["name"] == "picture" and e["pid"] == 1]
    first = document["rows"][0]
    assert len(whole) == first["summary"]["n"]
    assert whole[3]["dur"] == pytest.approx(1e3 * first["total_ms"][3])
    parts = [e for e in trace if e["pid"] == 1 and e["ph"] == "X" and e["name"] != "picture"]
    ends = {e["ts"]: e["ts"] + e["dur"] for e in whole}
    for part in parts:  # within its picture, in microseconds
        begin = max(t for t in ends if t <= part["ts"])
        assert part["ts"] + part["dur"] <= ends[begin] + 1


def test_report_is_one_page_that_needs_nothing_else(measured, tmp_path):
    assert command.main(["report", str(measured), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert text.count("<svg") == 3 and "not measured (give --labels" in text
    assert not re.search(r'(src|href)="(?!#)', text) and "@import" not in text
    for word in ("paced 20/s, 2 steps", "load_average", "Environment", "back-to-back"):
        assert word in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium (Debian package)")
def test_the_page_opens_in_a_browser(measured, tmp_path):
    shot = tmp_path / "page.png"
    page_url = (measured / "latency.html").resolve().as_uri()
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,3000",
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page_url],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    picture = cv2.imread(str(shot))
    assert picture is not None, done.stderr[-500:]
    assert picture.shape[0] == 3000 and len(np.unique(picture[600:2600].reshape(-1, 3), axis=0)) > 8


def test_quality_is_drawn_with_its_front(measured):
    document = documents.load(measured / "latency.json")
    for i, found in enumerate(document["rows"]):
        found["quality"] = {"what": "mIoU", "value": 0.5 + 0.01 * i}
    assert page.render({"a": document}).count("<svg") == 4
    assert page.pareto([(5, 0.5), (1, 0.2), (3, 0.6), (2, 0.2), (9, 0.6)]) == [1, 2]


def test_labels_of_points_do_not_lie_on_each_other():
    taken = []
    for _ in range(5):
        up = next(n for n in (4, -11, 13, -20, 22, -29, 31) if page._free(4, n, taken))
        taken.append((4, up))
    assert len(set(taken)) == 5 and page._free(40, 4, taken)


def test_tables_fit_a_terminal():
    rows = [{"row": f"configuration {i}", "p50": f"{i}.0 [1, 2]", "late": ""} for i in range(7)]
    assert report.fitted(rows, 0) == report.fitted(rows, 200) == report.table(rows)
    narrow = report.fitted(rows, 38)
    assert max(map(len, narrow.splitlines())) <= 38 and "late" not in narrow
    assert all(f"configuration {i}" in narrow and f"{i}.0 [1, 2]" in narrow for i in range(7))
    assert report.fitted(rows[:1], 5).count("\n") == 2  # as narrow as it can be


def test_miou_of_labelled_pictures(tmp_path):
    from benchmarks import metrics
    from sdk import Segmenter

    def prior(picture):
        return (picture[..., 0] > 127).astype(np.int32)

    seg = Segmenter(prior, refine=None, filter=None)
    with pytest.raises(InputError, match="names its classes"):
        latency.quality_of(seg, [PICTURE], [np.zeros((48, 64), np.uint8)])
    seg.prior.names = ["dark", "light"]
    truth = (PICTURE[..., 0] > 127).astype(np.uint8)
    truth[:10] = 255
    truth[10:20] = 1 - truth[10:20]
    found = latency.quality_of(seg, [PICTURE], [truth])
    counts = metrics.confusion(seg(PICTURE).labels, truth, 2, ignore=255)
    assert found == {"what": "mIoU", "value": metrics.miou(counts), "pictures": 1}
    assert 0.4 < found["value"] < 0.8


def test_an_interrupt_keeps_what_was_measured(tmp_path):
    code = (
        "import sys\n"
        "from benchmarks import __main__ as command, latency\n"
        "real = latency.back_to_back\n"
        "def telling(row, seg, pictures, seconds, tell):\n"
        "    def told(now):\n"
        "        tell(now)\n"
        "        if len(row.total_ms) == 5:\n"
        "            print('measuring', file=sys.stderr, flush=True)\n"
        "    real(row, seg, pictures, seconds, told)\n"
        "latency.RUN['back-to-back'] = telling\n"
        "sys.exit(command.main(sys.argv[1:]))\n"
    )
    argv = ["-c", code, "latency", "--imgsz", "64x64", "--duration", "600", "--refine", "1"]
    (tmp_path / "p.png").write_bytes(encode_image(PICTURE, ".png"))
    argv += ["--picture", str(tmp_path / "p.png"), "--mode", "back-to-back", "-o", str(tmp_path)]
    child = subprocess.Popen(
        [sys.executable, *argv], cwd=HERE, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while (line := child.stderr.readline()) != "measuring\n":
        assert line, child.wait(60)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 130 and "marked partial" in err, err
    document = documents.load(tmp_path / "latency.json")
    assert document["partial"] and document["rows"][0]["partial"]
    assert document["rows"][0]["summary"]["n"] > 3 and "partial" in out
    assert "Partial" in (tmp_path / "latency.html").read_text()
    with pytest.raises(InputError, match="partial"):
        compare.main([str(tmp_path / "latency.json")] * 2)


def test_a_second_interrupt_loses_nothing(tmp_path):
    """Summing up takes a while: it is not to be interrupted."""
    (tmp_path / "p.png").write_bytes(encode_image(PICTURE, ".png"))
    code = (
        "import signal, sys\n"
        "from benchmarks import __main__ as command, latency\n"
        "real, calls = latency.back_to_back, []\n"
        "def first(row, seg, pictures, seconds, tell):\n"
        "    real(row, seg, pictures, 0.3, tell)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "latency.RUN['back-to-back'] = first\n"
        "summed = latency.summarise\n"
        "def again(*args):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    return summed(*args)\n"
        "latency.summarise = again\n"
        "sys.exit(command.main(sys.argv[1:]))\n"
    )
    argv = ["latency", "--picture", str(tmp_path / "p.png"), "--refine", "1", "--threads", "1"]
    argv += ["--mode", "back-to-back", "-o", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=HERE, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 130 and "marked partial" in done.stderr, done.stderr
    found = documents.load(tmp_path / "latency.json")
    assert found["partial"] and found["rows"][0]["summary"]["n"] > 3


@pytest.mark.parametrize("column", ["stages_ms", "total_ms", "start_s", "steps_done", "cpu_mhz"])
def test_an_interrupt_within_a_sample_costs_that_sample(column):
    made, result = row(), Fake()(PICTURE)
    for i in range(30):
        made.add(i, i, i + 0.01 + 0.001 * (i % 3), result, 1000.0)
    columns = made.stages_ms["refine"] if column == "stages_ms" else getattr(made, column)
    columns.append(5.0)
    found = latency.summarise(made, [50.0])
    assert found["summary"]["n"] == 30 and {len(c) for c in made.stages_ms.values()} == {30}
    made.start_s.pop()
    assert latency.summarise(made, [50.0])["summary"]["n"] == 29


@pytest.mark.parametrize("kind", [MemoryError, OSError, RuntimeError])
def test_any_failure_keeps_what_was_measured(tmp_path, monkeypatch, kind):
    (tmp_path / "p.png").write_bytes(encode_image(PICTURE, ".png"))

    def fails(*_):
        raise kind("no memory")

    monkeypatch.setattr(latency, "memory_run", fails)
    argv = ["--picture", str(tmp_path / "p.png"), "--refine", "1", "--duration", "0.3", "--memory"]
    with pytest.raises(kind):
        latency.main([*argv, "--mode", "back-to-back", "-o", str(tmp_path)])
    assert documents.load(tmp_path / "latency.json")["partial"]


def test_ctrl_c_counts_once_a_second_and_only_while_measuring():
    ctrl_c = latency.Interrupts()
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()
    ctrl_c()  # at once: the first one is at work
    ctrl_c.last -= 2
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()  # something has swallowed the first one
    ctrl_c.last, ctrl_c.wanted = -1.0, False
    ctrl_c()


def test_odd_file_names_are_shown(tmp_path, capsys):
    folder = tmp_path / "r\udcff"
    folder.mkdir()
    (folder / "p\udcff.png").write_bytes(encode_image(PICTURE, ".png"))
    argv = [
        "latency",
        "--picture",
        str(folder / "p\udcff.png"),
        "--refine",
        "0",
        "--duration",
        "0.3",
    ]
    assert command.main([*argv, "--mode", "back-to-back", "-o", str(folder)]) == 0
    assert command.main(["report", str(tmp_path)]) == 0
    assert "r?" in (tmp_path / "report.html").read_text()


def test_what_cannot_be_written_costs_nothing_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.png").write_bytes(encode_image(PICTURE, ".png"))
    real = latency.write_atomic

    def full(path, data):
        if path.name in ("latency.json", "latency.md"):
            raise InputError(f"{path} cannot be written: File too large")
        real(path, data)

    monkeypatch.setattr(latency, "write_atomic", full)
    argv = ["latency", "--picture", str(tmp_path / "p.png"), "--refine", "1", "--duration", "0.3"]
    out = tmp_path / "out"
    assert command.main([*argv, "--mode", "back-to-back", "-o", str(out)]) == 1
    told = capsys.readouterr()
    assert "latency.json cannot be written" in told.err and "| back-to-back, 1 step" in told.out
    assert sorted(p.name for p in out.iterdir()) == ["latency.csv", "latency.html", "trace.json"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *argv, "--mode", "back-to-back"],
        cwd=HERE, stdout=open("/dev/full", "w"), stderr=subprocess.PIPE, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1 and "the disk is full" in done.stderr, done.stderr


def test_refinements_are_told_apart():
    names = {latency.refinement(RefineConfig.preset(p)) for p in latency.PRESETS}
    assert len(names) == len(latency.PRESETS)
    assert latency.refinement(RefineConfig(steps=3, seed=7)) == "residual at scale 0.5"


def test_an_error_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.png").write_bytes(encode_image(PICTURE, ".png"))

    def fails(*_):
        raise InputError("no such memory")

    monkeypatch.setattr(latency, "memory_run", fails)
    argv = ["latency", "--picture", str(tmp_path / "p.png"), "--refine", "1", "--duration", "0.3"]
    out = tmp_path / "out"
    assert command.main([*argv, "--memory", "--mode", "back-to-back", "-o", str(out)]) == 1
    told = capsys.readouterr()
    assert "no such memory" in told.err and "marked partial" in told.err
    found = documents.load(out / "latency.json")
    assert found["partial"] and len(found["rows"]) == 1 and not found["rows"][0]["partial"]


def test_nothing_measured_replaces_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "measure", interrupted)
    assert command.main(["latency", "-o", str(tmp_path / "new" / "one")]) == 130
    assert not list(tmp_path.iterdir())
    (tmp_path / "latency.json").write_text("old")
    assert command.main(["latency", "-o", str(tmp_path)]) == 130
    assert (tmp_path / "latency.json").read_text() == "old"
    assert "nothing is written" in capsys.readouterr().err
    (tmp_path / "latency.csv").mkdir()
    assert command.main(["latency", "-o", str(tmp_path)]) == 1
    assert "latency.csv is a folder" in capsys.readouterr().err


def test_frames_that_start_cold_are_said():
    made = row("stream")
    result = Fake()(PICTURE)
    for i in range(30):
        result.frame = types.SimpleNamespace(start="cold" if i == 7 else "warm")
        made.add(i, i, i + 0.01, result, None)
    assert made.cold == 1
    reasons = latency.summarise(made, [50.0])["summary"]["unstable"]
    assert "1 of its frames started cold, with more steps" in reasons
    made.steps = 0  # a prior alone has no more of them
    assert not latency.summarise(made, [50.0])["summary"]["unstable"]


@pytest.mark.parametrize("network", [True, False])
def test_quality_of_a_bundle_is_that_of_the_row(tmp_path, network):
    """A prior that has gone wrong since it was recorded shows, and steps matter."""
    from bundles import tiny_bundle

    from sdk import Segmenter

    tiny_bundle(tmp_path / "a.bundle", with_network=network)
    for config in (None, RefineConfig(steps=2), RefineConfig(steps=1, scale=0.3)):
        seg = Segmenter(tmp_path / "a.bundle", refine=config, self_test="never")
        found = latency.quality_of(seg, [PICTURE], None)
        assert found["value"] == 1.0 and found["what"].startswith("agreement with float32")
    seg.prior = Wrong(seg.prior.names)
    assert latency.quality_of(seg, [PICTURE], None)["value"] < 1


class Wrong:
    """A prior that is sure of its first class everywhere."""

    backend = "test"

    def __init__(self, names):
        self.names = names

    def __call__(self, picture, low):
        return np.eye(len(self.names or "abc"), dtype=np.float32)[np.zeros(low.shape[:2], int)]


def test_quality_at_the_size_of_a_step_graph(tmp_path):
    """It is fixed, and no other picture's: the reference is to have it, too."""
    pytest.importorskip("torch", reason="exports")
    from export.models import load_model
    from export.pack import ExportOptions, export_bundle

    options = ExportOptions(targets=("onnx",), refine=RefineConfig(steps=2), imgsz=(40, 64))
    export_bundle(load_model("kmeans", None, None), tmp_path / "k.bundle", options)
    from sdk import Segmenter

    seg = Segmenter(
        tmp_path / "k.bundle", refine=RefineConfig(steps=2), refine_backend="onnx",
        self_test="never",
    )  # fmt: skip
    assert latency.quality_of(seg, [PICTURE], None)["value"] > 0.999


def test_memory_and_power_are_runs_of_their_own(tmp_path, monkeypatch):
    options = {"prior": "kmeans", "refine": None, "threads": 1}
    found = latency.memory_run(options, PICTURE)
    assert 0 <= found["loaded MiB"] <= found["peak MiB"] < 400
    monkeypatch.setattr(latency.machine, "power_source", lambda: None)
    assert latency.power_run(Fake(), [PICTURE], 1.0) is None


def test_energy_of_a_picture_is_what_idle_does_not_draw(monkeypatch):
    class Meter:
        seconds, drawn = 2.0, iter((10.0, 30.0))

        def __enter__(self):
            self.joules = next(Meter.drawn)
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(latency.machine, "power_source", lambda: "a sensor")
    monkeypatch.setattr(latency.machine, "PowerMeter", Meter)
    monkeypatch.setattr(latency, "IDLE", 0.0)
    found = latency.power_run(Fake(), [PICTURE], 0.2)
    assert found["idle W"] == 5 and found["W"] == 15
    assert found["J a picture, idle subtracted"] == pytest.approx(20 / found["pictures"])


@pytest.mark.parametrize("preset", ["residual", "dynaguide"])
def test_the_torch_peer_computes_the_same(preset, capsys):
    pytest.importorskip("torch", reason="needs PyTorch")
    from benchmarks import peers
    from sdk import RefineConfig, Segmenter

    config = RefineConfig.preset(preset)
    seg = Segmenter("kmeans", refine=type(config)(**{**vars(config), "steps": 2}), threads=1)
    found = peers.torch_eager(seg, PICTURE, 0.1)
    assert found["turns"] >= 3 and len(found["samples"]["peer_ms"]) == found["turns"]
    ratios = np.divide(found["samples"]["peer_ms"], found["samples"]["ours_ms"])
    middle = np.sort(ratios)[(len(ratios) - 1) // 2]
    assert found["peer / ours, median of the turns"].startswith(f"{middle:.2f}")


def test_the_opencv_peer_filters_the_same_picture(monkeypatch, clock):
    from benchmarks import peers
    from sdk import Segmenter

    with pytest.raises(MissingBackend, match="no ximgproc"):
        monkeypatch.delattr(cv2, "ximgproc", raising=False)
        peers.check("opencv-guided-filter")
    calls = []
    fake = types.SimpleNamespace(guidedFilter=lambda *a: calls.append(a) or time.sleep(0.02))
    monkeypatch.setattr(cv2, "ximgproc", fake, raising=False)
    peers.check("opencv-guided-filter")
    found = peers.opencv_guided_filter(Segmenter("kmeans", refine=None), PICTURE, 0.1)
    guide, values, radius, eps = calls[-1]
    assert guide.shape == (48, 64, 3) and guide.dtype == np.float32 and guide.max() <= 1
    assert values.shape == (48, 64) and (radius, eps) == (8, 1e-3)
    assert found["turns"] >= 3 and found["peer p50 ms"] > 15 > found["ours p50 ms"]


def test_turns_are_told_apart(clock):
    from benchmarks import peers

    found = peers.in_turns(lambda: time.sleep(0.002), lambda: time.sleep(0.01), 0.1)
    assert min(found["samples"]["peer_ms"]) > max(5, found["ours p50 ms"])


# --- compare -------------------------------------------------------------------------------------


def test_the_device_clock_has_a_column_of_its_own():
    """It is the native refinement's on a GPU; elsewhere there is none."""

    def result(**stats):
        return types.SimpleNamespace(
            timings={"refine": 5.0, "total": 7.0}, stats={"steps": 2} | stats
        )

    there, here = row(), row()
    for i in range(4):
        there.add(i, i, i + 0.007, result(device_ms={"refine": 1.0 + i}), None)
        here.add(i, i, i + 0.007, result(), None)
    assert documents.summarise(there, [50])["stage_p50_ms"]["refine, device time"] == 2.5
    assert "refine, device time" not in documents.summarise(here, [50])["stage_p50_ms"]
    assert there.device_ms == {"refine": [1.0, 2.0, 3.0, 4.0]} and not here.device_ms
