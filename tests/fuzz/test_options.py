"""Command lines of any words: an exit code and one error, never a traceback; and the readers of
single options."""

import argparse
import contextlib
import io

import pytest
from fuzzing import inputs, limits, refusal
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.__main__ import main as benchmarks
from benchmarks.latency import options as latency
from benchmarks.speed.harness import thread_counts
from export.__main__ import main as export
from runtime.__main__ import main as runtime
from runtime.device.driver import parse_device
from runtime.errors import ExitCode, InputError
from runtime.tools.cli import capabilities, gpu_index, workspace_bytes
from sdk.__main__ import main as sdk

TEXTS = [
    *("", " ", "0", "1", "-1", "2", "3.5", "-0", "1e999", "nan", "inf", "1e-400", "0x10", "1_0"),
    *("9" * 5000, str(2**31), str(2**63), str(-(2**63)), "٣", "²", "٣٨٤x٥١٢", "1e3", "+1", "01"),
    *("384x512", "384 512", "384X512", "512", "x", "x5", "5x5x5", "384,512", "0x0", "99999x1"),
    *(
        "8.6",
        "8.6,9.0",
        "sm_90",
        "86",
        "8.٦",
        ",",
        ",,",
        "a,b",
        "2G",
        "2048M",
        "auto",
        "1.5",
        "2g ",
    ),
    *("cpu", "cuda", "cuda:0", "cuda:99", "cuda:٣", "0,4,8", "50,99", "kmeans", "none", "default"),
    *("é", "\udcff", "\n", "a\nb", "\x1b[2J", "x" * 1000, "-", "--", "-x", "--no"),
    *("missing.png", "missing.onnx", "missing.bundle", "trt", "rtx", "onnx", "onnx,rtx", "fp16"),
    *("[1, 2, 3]", "0.5,0.5,0.5", "0.5", "[", "{", "(0,0,0)", "road,sky", '["road"]', "logits"),
]
ANY = st.characters(exclude_characters="\0")  # no system passes a zero byte in an argument
TEXT = st.sampled_from(TEXTS) | st.text(ANY, max_size=6) | st.integers(-(2**40), 2**40).map(str)
FILES = st.sampled_from(["out", "a/b/c", "", "x" * 300, "é", "\udcff", "a\nb", " ", "#", "!"])
SDK = (
    "--refine --steps --seed --min-area --imgsz --device --precision --backend --refine-backend "
    "--threads --no-filter --warm-steps --cold-steps --budget-ms --rate --drop --frames --timeout "
    "--json --coco --no-such -o --save --labels --state"
).split()
EXPORT = (
    "--mean --std --names --output --output-name --target --imgsz --batch --opset --refine --steps "
    "--seed --lr --scale --half --int8 --fraction --dynamic --min-shape --opt-shape --max-shape "
    "--engines --compute-capability --workspace --opt-level --device --min-agreement --json "
    "--allow-one-class --no-simplify -q --no-such -o --data --pictures --init --triton --weights"
).split()
RUNTIME = (
    "--device --engines --target --compute-capability --workspace --force --dry-run --json "
    "--timing-cache --no-such"
).split()
LATENCY = (
    "--picture --labels --video --imgsz --refine --scale --preset --mode --rate --duration "
    "--percentile --threads --device --precision --backend --refine-backend --peer --memory "
    "--power --export --json --no-such -o"
).split()
PATHS = {"-o", "--save", "--labels", "--state", "--data", "--pictures", "--init", "--triton"}
PATHS |= {"--weights", "--timing-cache", "--picture", "--video"}


def words(options):
    """Options of a command, most of them with a value."""
    one = st.sampled_from(options).flatmap(
        lambda name: st.tuples(st.just(name), FILES if name in PATHS else TEXT, st.integers(0, 9))
    )
    return st.lists(one, max_size=4).map(
        lambda found: [
            word
            for name, text, form in found
            for word in ([name] if form == 0 else [f"{name}={text}"] if form < 4 else [name, text])
        ]
    )


def ended(main, arguments):
    """Run a command; check its exit code, its streams and that it prints an error."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with limits(seconds=5.0), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
    for stream in (out, err):
        stream.flush()
    printed, errors = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert code in list(ExitCode), (code, errors)
    assert "Traceback" not in errors
    if code:
        found = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert found or "error" in printed, errors  # predict has one for each picture
    return code


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@inputs(120)
@given(
    command=st.sampled_from(["predict", "stream", "demo"]),
    source=st.sampled_from(["missing.png", "missing.mp4", "missing"]) | FILES,
    prior=st.sampled_from(["kmeans", "missing.onnx", "missing.bundle"]) | TEXT,
    options=words(SDK),
)
def test_sdk(here, command, source, prior, options):
    assert ended(sdk, [command, *options, f"--prior={prior}", "--", source]) != 0


@inputs(100)
@given(
    model=st.sampled_from(["missing.onnx", "é", "", "a.b", "\n"]),
    options=words(EXPORT),
)
def test_export(here, model, options):
    assert ended(export, [*options, f"--model={model}"]) != 0


@inputs(80)
@given(
    command=st.sampled_from(["inspect", "check", "build"]),
    folder=st.sampled_from(["missing.bundle", "."]) | TEXT,
    options=words(RUNTIME),
)
def test_runtime(here, command, folder, options):
    assert ended(runtime, [command, *options, "--", folder]) != 0


@inputs(100)
@given(options=words(LATENCY), prior=st.sampled_from(["missing.onnx", "missing.bundle"]))
def test_latency(here, options, prior):
    assert ended(benchmarks, ["latency", *options, "--", prior]) != 0


@inputs(50)
@given(
    command=st.sampled_from(["compare", "report", "latenci", "", "é"]),
    arguments=st.lists(st.sampled_from(TEXTS), max_size=3),
)
def test_other_benchmarks(here, command, arguments):
    assert ended(benchmarks, [command, *arguments]) != 0


LETTERS = "0123456789.,:x_-+eGMB cuda٣²\n"


def capability_words(value):
    return all(len(c) <= 4 and c.isascii() and float(c) < 100 for c in value)


READERS = [
    (capabilities, capability_words),
    (workspace_bytes, lambda v: v is None or (type(v) is int and 2**20 <= v <= 2**45)),
    (gpu_index, lambda v: 0 <= v < 1000),
    (parse_device, lambda v: v[0] in ("cpu", "cuda")),
    (latency.size_of, lambda v: all(1 <= n <= 16384 for n in v)),
    (latency.positive, lambda v: 0 < v < float("inf")),
    (latency.scale_of, lambda v: 0 < v <= 1),
    (latency.percentiles, lambda v: all(1 <= n <= 99.99 for n in v)),
    (latency.step_counts, lambda v: all(type(n) is int and 0 <= n <= 100_000 for n in v)),
    (thread_counts, lambda v: all(type(n) is int and n >= 1 for n in v)),
]


@inputs(250)
@given(
    which=st.integers(0, len(READERS) - 1),
    text=TEXT
    | st.text("0123456789.,:x_-+eGMB cuda٣²\n", max_size=8)
    | st.tuples(TEXT, TEXT).map(",".join),
)
def test_readers_of_single_options(which, text):
    read, is_right = READERS[which]
    with limits(seconds=0.2):
        try:
            value = refusal(lambda: read(text), InputError, longest=20_000)
        except argparse.ArgumentTypeError as error:
            assert str(error)
            return
    assert value is None or is_right(value), (read, text, value)
