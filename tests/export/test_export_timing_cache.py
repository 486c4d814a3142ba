"""The timing cache: one implementation for the exporter and for python -m runtime build."""

import os

import pytest
from bundles import tiny_engine

from runtime.engines import timing_cache
from runtime.engines.timing_cache import TimingCache
from runtime.errors import DeviceError, InputError

pytest.importorskip("onnx", reason="the graphs are made with onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install onnxruntime")
pytest.importorskip("skimage", reason="the demo photo is scikit-image's: pip install scikit-image")

from export.models.load import load_model
from export.pack import ExportOptions, export_bundle
from runtime.bundle import engines
from runtime.core.config import RefineConfig

CONFIG = RefineConfig(channels=4, steps=1, scale=0.25)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def build(monkeypatch):
    """A builder of one engine, whose timings are the old ones and "."; ``build.meanwhile`` runs
    while it builds."""

    def one(manifest, graphs, target, **options):
        return [tiny_engine()[0]]

    def built(entry, data, precision, *, timing_cache, **options):
        built.meanwhile()
        return *tiny_engine(), (timing_cache or b"") + b"."

    built.meanwhile = lambda: None
    monkeypatch.setattr(engines, "wanted_engines", one)
    monkeypatch.setattr(engines, "build", built)
    monkeypatch.setattr(engines, "check_start", lambda entries, device: None)
    return built


def export(folder, cache):
    options = ExportOptions(targets=("trt",), refine=CONFIG, imgsz=(48, 64), timing_cache=cache)
    return export_bundle(load_model("kmeans", None, None), folder / "x.bundle", options)


def test_the_exporter_replaces_the_file_as_a_whole(tmp_path, build):
    cache, link = tmp_path / "times", tmp_path / "link"
    cache.write_bytes(b"old")
    os.link(cache, link)  # is not changed, unless the file is written in place
    export(tmp_path, cache)
    assert cache.read_bytes() == b"old." and link.read_bytes() == b"old"
    assert names(tmp_path) == ["link", "times", "x.bundle"]


def test_the_exporter_fails_when_the_file_cannot_be_written(tmp_path, build):
    """It said so among the lines of its progress, which -q hides, and ended with exit code 0."""
    build.meanwhile = (tmp_path / "times").mkdir  # a folder cannot be replaced by a file
    with pytest.raises(InputError, match=r"timing cache .*times cannot be written: .*\n  fix: "):
        export(tmp_path, tmp_path / "times")
    assert names(tmp_path) == ["times"] and not names(tmp_path / "times")


def test_an_export_survives_a_library_that_cannot_start(tmp_path, build, monkeypatch):
    """The bundle is written without the engines, and the result says why."""

    def null(entries, device):
        raise DeviceError("tensorrt 11.4 does not start", fix="update NVIDIA's driver")

    monkeypatch.setattr(engines, "check_start", null)
    exported = export(tmp_path, None)
    assert exported.bundle.manifest["engines"] == []
    assert exported.missing.message == "tensorrt 11.4 does not start"


def test_no_file_no_cache(tmp_path):
    cache = TimingCache(None)
    cache.write(b"times")
    assert cache.times is None


def test_a_file_that_need_not_exist(tmp_path):
    cache = TimingCache(tmp_path / "times")
    assert cache.times == b"" and names(tmp_path) == []
    cache.write(None)
    assert names(tmp_path) == []
    cache.write(b"a")
    assert cache.times == b"a" and TimingCache(tmp_path / "times").times == b"a"
    assert names(tmp_path) == ["times"]


def test_what_cannot_be_used_is_refused_before_the_build(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"none/times has no folder\n  fix: mkdir -p "):
        TimingCache(tmp_path / "none" / "times")
    with pytest.raises(InputError, match=r"timing cache .* is a folder, wanted a file"):
        TimingCache(tmp_path)

    for error, reason, fix in (
        (PermissionError(13, "Permission denied"), "Permission denied", "check its permissions"),
        (OSError(27, "File too large"), "File too large", "raise the limit for the size of a file"),
    ):

        def sealed(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(timing_cache, "write_new", sealed)
        with pytest.raises(InputError, match=rf"written: {reason}\n  fix: {fix}.*; or name"):
            TimingCache(tmp_path / "times")
    assert names(tmp_path) == []
