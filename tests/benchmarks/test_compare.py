"""Reading the documents of the profiler, and comparing two of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from cases import case

pytest.importorskip("scipy", reason="the profiler needs SciPy")
pytest.importorskip("matplotlib", reason="the profiler's page needs matplotlib")

from benchmarks import __main__ as command
from benchmarks import table
from benchmarks.latency import compare, page, reading
from benchmarks.latency import document as documents
from benchmarks.speed import harness
from runtime.errors import InputError

NOT_OURS = r"is not what 'benchmarks latency' writes: .*\n  fix: measure again, or leave"


def document(times, **more):
    made = documents.Row("back-to-back", 4, 1)
    made.total_ms = list(times)
    made.start_s = list(np.cumsum(times) / 1e3)
    made.stages_ms = {"refine": list(times), "unaccounted": [0.0] * len(times)}
    made.steps_done = [4] * len(times)
    made.cpu_mhz = [None] * len(times)
    found = documents.summarise(made, [50.0, 99.0])
    return (
        {part: [] for part in documents.PARTS}
        | {
            "scope": "",
            "device_time": "",
            "prior": "kmeans",
            "partial": False,
            "command": [],
            "hashes": {},
            "percentiles": [50.0, 99.0],
            "schema": "dg-latency/1",
            "rows": [found],
            "environment": {},
            "picture": [1, 1, 1],
        }
        | more
    )


def skewed(seed, n=1000, scale=1.0):
    rng = np.random.default_rng(seed)
    return scale * (20 + rng.gamma(2, 0.5, n))


def test_compare_finds_5_percent_and_does_not_cry_at_1():
    found = {1.0: 0, 1.01: 0, 1.05: 0}
    for seed in range(20):
        a = document(skewed(seed))
        for scale in found:
            b = document(skewed(1000 + seed, scale=scale))
            found[scale] += compare.compare(a, b, [50.0, 99.0], 0.03)[1]
    assert found == {1.0: 0, 1.01: 0, 1.05: 20}


def test_compare_says_slower_without_failing_below_the_limit():
    a, b = document(skewed(0)), document(skewed(1, scale=1.03))
    lines, failed = compare.compare(a, b, [50.0], 0.05)
    assert not failed and lines[0]["verdict"] == "slower"
    assert compare.compare(b, a, [50.0], 0.05)[0][0]["verdict"] == "faster"
    few = compare.compare(document(skewed(0, 50)), b, [99.0], 0.05)[0]
    assert few == [
        {"row": "back-to-back, 4 steps, 1 thread", "percentile": "p99"}
        | {"A ms": "-", "B ms": "-", "B / A": "-", "verdict": "-"}
    ]


def test_compare_says_which_percentiles_have_too_few_samples(tmp_path, capsys):
    def told(a, b):
        lines = compare.compare(a, b, None, 0.05)[0]
        return [line["percentile"] for line in lines if line["verdict"] == "-"]

    a, few = document(skewed(0)), document(skewed(0, 100))
    assert told(a, a) == [] and told(few, a) == ["p99"]
    assert told(document(skewed(0, 5)), a) == ["p50", "p90", "p95", "p99"]
    (tmp_path / "few.json").write_text(json.dumps(few))
    twice = [str(tmp_path / "few.json")] * 2
    assert compare.main(twice) == 0  # nobody asked for p99
    out = capsys.readouterr().out
    assert out.count("need") == 1 and out.endswith("for this percentile; p99 needs 299.\n")
    assert compare.main([*twice, "--percentile", "99"]) == 1
    assert "fix: measure both longer" in capsys.readouterr().err
    (tmp_path / "five.json").write_text(json.dumps(document(skewed(0, 5))))
    assert compare.main([str(tmp_path / "five.json")] * 2 + ["--force"]) == 0


def changed(path, **more):
    """Write a valid document with changed values: ``row_x`` changes x of its row."""
    found = document(skewed(0))
    for name, value in more.items():
        if name.startswith("row_"):
            found["rows"][0][name.removeprefix("row_")] = value
        else:
            found[name] = value
    path.write_text(json.dumps(found))
    return str(path)


def test_compare_fails_where_something_could_not_be_compared(tmp_path, capsys):
    a = changed(tmp_path / "a.json")
    two = document(skewed(0))
    two["rows"].append(document(skewed(1))["rows"][0] | {"steps": 9})
    (tmp_path / "two.json").write_text(json.dumps(two))
    for order in ([a, str(tmp_path / "two.json")], [str(tmp_path / "two.json"), a]):
        assert compare.main(order) == 1
        assert "9 steps, 1 thread is in one document only" in capsys.readouterr().err
        assert compare.main([*order, "--force"]) == 0
    assert compare.main([a, a, "--percentile", "99.9"]) == 1
    assert "p99.9 needs 2995." in capsys.readouterr().out
    for there, message in (
        ({"cpu": "another"}, "cpu: None in A, another in B"),
        ({"jetson": {"model": "Orin", "power_mode": "7W"}}, "jetson: None in A, {'model'"),
        ({"cpu_mhz_limits": [[1000, 2000]]}, "cpu_mhz_limits: None in A"),
        ({"before": {"gpus": [{"name": "X"}]}}, r"GPUs: \[\] in A, \['X'\] in B"),
    ):
        other = changed(tmp_path / "other.json", environment=there)
        with pytest.raises(InputError, match=message):
            compare.main([a, other])
    drivers = [
        changed(
            tmp_path / f"{d}.json", environment={"before": {"gpus": [{"name": "X", "driver": d}]}}
        )
        for d in "12"
    ]
    assert compare.main(drivers) == 0
    assert "drivers: ['1'] in A, ['2'] in B" in capsys.readouterr().err
    assert compare.main([a, changed(tmp_path / "m.json", hashes={"x": "1"}, prior="x.onnx")]) == 0
    told = capsys.readouterr().err
    assert "the model: kmeans in A, x.onnx in B" in told
    assert "only one document has the sha256 of x" in told
    two = [changed(tmp_path / f"{n}.json", hashes={"pictures": n}) for n in "12"]
    assert compare.main(two) == 0 and "the sha256 of pictures differs" in capsys.readouterr().err


def test_hostile_documents_are_refused(tmp_path):
    for more in (
        {"environment": "x"}, {"environment": None}, {"rows": [3]}, {"percentiles": [0]},
        {"percentiles": ["x"]}, {"memory": [3]}, {"overhead": 5}, {"row_mode": ["x"]},
        {"row_steps": -1}, {"row_steps": 1.5}, {"row_total_ms": [1e308]}, {"row_total_ms": "abc"},
        {"row_total_ms": [float("nan")] * 1000}, {"row_total_ms": [float("inf")] * 1000},
        {"row_total_ms": [-1.0] * 1000}, {"row_start_s": [1]}, {"row_stages_ms": {"refine": [1]}},
        {"row_stages_ms": 5}, {"row_cpu_mhz": None}, {"row_quality": 5}, {"row_rate": "fast"},
        {"row_quality": {"what": "mIoU", "value": "high"}}, {"row_total_ms": [10**400] * 1000},
        {"percentiles": [1e-9]}, {"percentiles": [99.9999999]}, {"percentiles": [50] * 3000},
        {"row_unserved": 3}, {"row_mode": "paced"}, {"row_rate": 5.0}, {"row_mode": "$\\frac{$"},
        {"overhead": {"ms_a_stage": 1, "share": 0.1}},
        {"rows": [document([1.0] * 9)["rows"][0] | {"steps": i} for i in range(101)]},
    ):  # fmt: skip
        path = Path(changed(tmp_path / "x.json", **more))
        with case(str(more)[:80]), pytest.raises(InputError, match=NOT_OURS):
            reading.load(path)


def test_what_a_document_says_of_its_samples_is_worked_out_again(tmp_path):
    path = changed(tmp_path / "x.json", row_summary={"unstable": 5}, row_name=["x"])
    found = reading.load(Path(path))["rows"][0]
    assert found["summary"]["n"] == 1000 and found["name"] == "back-to-back, 4 steps, 1 thread"
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is no JSON"):
        reading.load(tmp_path / "deep.json")


def test_a_report_replaces_no_result(tmp_path):
    changed(tmp_path / "latency.json")
    before = (tmp_path / "latency.json").read_bytes()
    with pytest.raises(InputError, match=r"latency\.json would be overwritten by the page"):
        page.main([str(tmp_path), "-o", str(tmp_path / "latency.json")])
    assert (tmp_path / "latency.json").read_bytes() == before


def test_report_leaves_broken_files_out(tmp_path, capsys):
    changed(tmp_path / "good.json", command=[1, None], hashes={"a": 5})
    changed(tmp_path / "bad.json", row_total_ms=5)
    (tmp_path / "other.json").write_text("{}")
    assert page.main([str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert "left out" in told and "bad.json" in told and "other.json" not in told
    odd = {"what": "mIoU $\\frac{$", "value": 0.5}
    changed(tmp_path / "odd.json", row_quality=odd, row_backend="$x^$")
    assert page.main([str(tmp_path)]) == 0 and "odd.json" not in capsys.readouterr().err
    changed(tmp_path / "half.json", scope="\ud800")
    assert page.main([str(tmp_path)]) == 0 and "half.json is no JSON" in capsys.readouterr().err
    assert "<h1>good:" in (tmp_path / "report.html").read_text()


def test_compare_command(tmp_path, capsys):
    paths = {}
    for name, times in {
        "a": skewed(0), "slow": skewed(1, scale=1.2), "wild": skewed(2) * np.linspace(1, 2, 1000)
    }.items():  # fmt: skip
        paths[name] = str(tmp_path / f"{name}.json")
        Path(paths[name]).write_text(json.dumps(document(times)))
    assert command.main(["compare", paths["a"], paths["a"]]) == 0
    assert command.main(["compare", paths["a"], paths["slow"], "--fail-over", "5%"]) == 6
    assert "REGRESSION" in capsys.readouterr().out
    assert command.main(["compare", paths["a"], paths["slow"], "--fail-over", "0.3"]) == 0
    with pytest.raises(SystemExit, match="2"):
        command.main(["compare", paths["a"], paths["slow"], "--fail-over", "5"])
    assert "as 5% or 0.05" in capsys.readouterr().err
    assert command.main(["compare", paths["a"], paths["wild"]]) == 1
    assert "cannot be compared" in capsys.readouterr().err
    assert command.main(["compare", paths["a"], paths["wild"], "--force"]) == 6


def test_compare_refuses_other_files(tmp_path):
    path = tmp_path / "x.json"
    for text in (
        *("", "[]", "{}", '{"schema": "dg-latency/1"}'),
        '{"schema": "dg-latency/1", "rows": [3]}',
    ):
        path.write_text(text)
        with case(text), pytest.raises(InputError, match=r"x\.json is"):
            reading.load(path)
        fix = r"holds no result.*\n  fix: python -m benchmarks latency"
        with case(text), pytest.raises(InputError, match=fix):
            page.main([str(tmp_path)])
    with pytest.raises(InputError, match=r"cannot be read.*\n  fix: python -m benchmarks latency"):
        reading.load(tmp_path / "none.json")


def test_compare_needs_rows_in_common(tmp_path):
    other = document(skewed(0))
    other["rows"][0]["steps"] = 9
    for name, found in {"a": document(skewed(0)), "b": other}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match="no row in common"):
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])


def test_one_configuration_is_one_row(tmp_path):
    assert harness.thread_counts("2,1,2") == [2, 1]
    twice = document(skewed(0))
    twice["rows"] *= 2
    (tmp_path / "twice.json").write_text(json.dumps(twice))
    with pytest.raises(InputError, match="two of its rows have the same configuration"):
        reading.load(tmp_path / "twice.json")


def stored(path, **more):
    """Write a document as `benchmarks latency` does, with changed values in its row."""
    found = documents.stored(document(skewed(0))) | {"schema": documents.SCHEMA}
    found["rows"][0] |= more
    path.write_text(table.as_json(found))
    return path


def test_summaries_are_read_as_the_samples_were(tmp_path):
    """A file without the samples of stages gives the same tables as one with all samples."""
    times = skewed(0).round(3)
    times[[3, 500]] = 40.0
    full = document(times, peers=[{"peer": "x", "samples": {"ours_ms": [1.0]}}])
    whole, short = tmp_path / "whole.json", tmp_path / "short.json"
    whole.write_text(json.dumps(full))
    short.write_text(table.as_json(documents.stored(full) | {"schema": documents.SCHEMA}))
    a, b = reading.load(whole), reading.load(short)
    assert documents.as_text(a) == documents.as_text(b) and "outliers #3 at" in documents.as_text(b)
    assert documents.as_csv(a) == documents.as_csv(b)
    assert [r["total_ms"] for r in a["rows"]] == [r["total_ms"] for r in b["rows"]]
    assert b["peers"] == [{"peer": "x"}] and "stages_ms" not in b["rows"][0]
    assert compare.main([str(whole), str(short)]) == 0
    assert page.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 6 and "number of the sample" in text


def test_a_printed_document_is_read_too(tmp_path):
    """The option --json prints a document with all samples."""
    (tmp_path / "x.json").write_text(json.dumps(document(skewed(0)) | {"schema": documents.SCHEMA}))
    assert "stages_ms" in reading.load(tmp_path / "x.json")["rows"][0]


def test_hostile_summaries_are_refused(tmp_path):
    reading.load(stored(tmp_path / "good.json"))
    for more in (
        {"total_ms": "abc"}, {"total_ms": ["x"]}, {"total_ms": [-1.0]}, {"total_ms": [1e308]},
        {"stage_p50_ms": 5}, {"stage_p50_ms": {"prior": "x"}}, {"stage_percentiles_ms": [1]},
        {"stage_percentiles_ms": {"prior": 5}}, {"summary": 5}, {"summary": {}},
        {"summary": {"outliers": [5]}}, {"start_s": [1.0]},
        {"summary": {"outliers": {"index": [1], "start_s": [], "ms": [], "cpu_mhz": []}}},
        {"summary": {"outliers": {"index": [[]], "start_s": [1], "ms": [1], "cpu_mhz": [1]}}},
    ):  # fmt: skip
        path = stored(tmp_path / "x.json", **more)
        with case(more), pytest.raises(InputError, match=NOT_OURS):
            reading.load(path)
