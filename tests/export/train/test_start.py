"""From the command line to what the loop is given: held-out pictures, views, shifts, cache."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from training import CHANNELS, TINY, draw_pictures, tiny_backbone, torch, train, trained

from export.train import feature_cache, select, shifts
from export.train.features import FeatureBatches
from export.train.run import read_checkpoint, read_entry
from export.train.select import split
from export.train.views import ViewRule
from runtime.pictures.files import picture_files

SHORT = (*TINY, "--steps", "1", "--batch", "2")
DEVICES = [(0, "cuda:0", 4, "torch finds no GPU that"), (2, "cuda:2", 1, "torch finds 2 GPUs")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("start") / "pictures", 30)


def asked(monkeypatch, name):
    """What the function of ``select`` with this name is asked about. Its score is always 0."""
    questions = []

    def ask(*question):
        questions.append(question)
        return lambda: 0.0

    monkeypatch.setattr(select, name, ask)
    return questions


def test_a_tenth_of_the_pictures_is_held_out_by_the_seed(data, tmp_path, monkeypatch):
    questions = asked(monkeypatch, "energy_score")
    run = trained(data, tmp_path / "run", *SHORT, "--select", "energy", "--seed", "5")
    assert read_entry(run)["loop"]["holdout"] == 0.1
    ((_, held),) = questions
    assert held.files == split(picture_files([data]), 0.1, 5)[1] and len(held.files) == 3


def test_labels_are_those_of_held_out_pictures(data, tmp_path, monkeypatch):
    questions = asked(monkeypatch, "labels_score")
    words = ("--select", "labels", "--holdout", "0.2", "--seed", "5")
    words += ("--labels", tmp_path / "labels", "--classes", tmp_path / "classes")
    trained(data, tmp_path / "run", *SHORT, *words)
    ((_, backbone, size, held, *paths),) = questions
    assert held == split(picture_files([data]), 0.2, 5)[1]
    assert (backbone.name, size) == ("tiny", 32)
    assert paths == [tmp_path / "labels", tmp_path / "classes"]


def test_pictures_are_held_out_as_in_earlier_versions():
    """Else a run of an earlier version would be resumed on pictures that it held out."""
    assert split([*range(20)], 0.2, 0)[1] == [1, 10, 16, 18]
    assert split([*range(20)], 0.2, 7)[1] == [1, 14, 17, 18]


def test_the_energy_is_the_mean_over_batches_that_are_large_enough():
    used = []

    def energy(views):
        used.append(views)
        return float(len(views))

    held = SimpleNamespace(views=7, batch=3, of=np.array, spread=np.arange(7), files=["a", "b"])
    score = select.energy_score(SimpleNamespace(held_out=energy), held)
    assert score() == 3.5
    assert [v.tolist() for v in used] == [[0, 1, 2, 3], [4, 5, 6]]


def test_the_miou_is_computed_on_pictures_as_the_frozen_prior_sees_them(
    data, tmp_path, monkeypatch
):
    import cv2

    rules = []

    def counted(_network, rule, pairs, classes):
        rules.append((rule, [picture for picture, _ in pairs], classes))
        return np.eye(2, dtype=np.int64)

    monkeypatch.setattr("export.train.matching.confusion_of", counted)
    files = picture_files([data])[:2]
    for file in files:
        assert cv2.imwrite(str(tmp_path / file.name), np.zeros((32, 40), np.uint8))
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    backbone = tiny_backbone()
    method = SimpleNamespace(module=torch.nn.Linear(1, 1))
    select.labels_score(method, backbone, 48, files, tmp_path, tmp_path / "classes.txt")
    ((rule, pictures, classes),) = rules
    assert (rule.mean, rule.std) == (backbone.mean, backbone.std)
    assert (rule.height, rule.width, rule.multiple, rule.minimum) == (48, 48, 8, 8)
    assert rule.color == "rgb" and classes == 2
    assert np.array_equal(pictures[1], cv2.imread(str(files[1]))[..., ::-1])


def test_shifts_are_estimated_from_64_views_of_all_pictures(tmp_path, monkeypatch):
    """The first and the last view are among them."""
    seen = []

    def estimate(features, clusters):
        seen.append((features, clusters))
        return 0.3, 0.5

    monkeypatch.setattr(shifts, "estimate_shifts", estimate)
    for count in (70, 5):
        data = draw_pictures(tmp_path / str(count), count)
        words = ("--imgsz", "32", "--clusters", "3", "--dim", "4", "--threads", "1", "--no-cache")
        words += ("--data", data, "-o", tmp_path / f"{count} run", "--steps", "1", "--batch", "2")
        ended = train("segunify", *words)
        assert ended.code == 0, ended.err
        features, clusters = seen.pop()
        assert features.shape == (min(64, count), CHANNELS, 4, 4) and clusters == 3
        views = FeatureBatches(
            picture_files([data]), ViewRule(size=32), tiny_backbone(), batch=1, seed=0, device="cpu"
        )
        assert torch.equal(features[[0, -1]], views.of([0, count - 1]))
        assert len({f.numpy().tobytes() for f in features}) == len(features)


def test_a_folder_of_broken_pictures_ends_the_estimation_of_shifts(tmp_path):
    data = draw_pictures(tmp_path / "pictures", 25, broken=range(25))
    words = ("--imgsz", "32", "--clusters", "3", "--dim", "4", "--threads", "1", "--no-cache")
    words += ("--data", data, "-o", tmp_path / "run", "--steps", "1", "--batch", "2")
    ended = train("segunify", *words)
    ended.refused(1, "2 of 25 pictures cannot be used; wanted at most 1: ")
    assert "the next picture" not in ended.err


def test_the_views_are_those_of_the_preset_unless_they_are_named(data, tmp_path):
    words = ("--preset", "coco27", "--dim", "4", "--steps", "1", "--batch", "2", "--no-cache")
    words += ("--intra-shift", "0", "--inter-shift", "0", "--data", data, "--threads", "1")
    for number, (named, views) in enumerate(
        [
            ((), {"size": 224, "crops": "five"}),
            (("--imgsz", "32"), {"size": 32, "crops": "five"}),
            (("--crops", "centre"), {"size": 224, "crops": "centre"}),
        ]
    ):
        run = tmp_path / str(number)
        ended = train("segunify", *words, *named, "-o", run)
        assert ended.code == 0, ended.err
        assert read_entry(run)["views"] == views


def test_as_many_processes_read_pictures_as_are_named(data, tmp_path, monkeypatch):
    made = []

    class Noted(FeatureBatches):
        def __init__(self, *arguments, **options):
            made.append(options["workers"])
            super().__init__(*arguments, **options | {"workers": 0})

    monkeypatch.setattr("export.train.features.FeatureBatches", Noted)
    trained(data, tmp_path / "run", *SHORT, "--workers", "3")
    assert made == [3]


def test_the_limit_of_the_cache_is_in_gib(data, tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(feature_cache, "FeatureCache", lambda _, limit: limits.append(limit))
    words = [word for word in SHORT if word != "--no-cache"]
    words += ["--data", data, "--cache", tmp_path / "cache", "-q"]
    for number, (limit, size) in enumerate([("0.5", 2**29), ("1048576", 2**50)]):
        ended = train("segunify", *words, "--cache-limit", limit, "-o", tmp_path / str(number))
        assert ended.code == 0, ended.err
        assert limits.pop() == size
    for limit in ("1048577", "inf", "nan", "-1"):
        ended = train("segunify", *words, "--cache-limit", limit, "-o", tmp_path / "no")
        assert ended.refused(1, "cache-limit is", "wanted GiB, above 0")


@pytest.mark.parametrize(("count", "device", "code", "text"), DEVICES)
def test_a_gpu_that_is_not_there(data, tmp_path, monkeypatch, count, device, code, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    words = ("--data", data, "-o", tmp_path / "run", *SHORT, "--device", device)
    assert train("segunify", *words).refused(code, f"device is {device}, but {text}")


class Stopped(Exception):
    """Ends a start."""


def test_fp32_is_exact_on_a_gpu(data, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise Stopped

    flags = [(torch.backends.cudnn, n) for n in ("deterministic", "benchmark", "allow_tf32")]
    flags.append((torch.backends.cuda.matmul, "allow_tf32"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("export.train.features.FeatureBatches", stop)
    before = (False, True, True, True)
    for words, wanted in [
        (("--device", "cuda"), (True, False, False, False)),
        (("--device", "cuda", "--precision", "bf16"), before),
        (("--device", "cpu"), before),
    ]:
        found = [getattr(*flag) for flag in flags]
        try:
            for flag, value in zip(flags, before, strict=True):
                setattr(*flag, value)
            with pytest.raises(Stopped):
                train("segunify", "--data", data, "-o", tmp_path / "run", *SHORT, *words)
            assert tuple(getattr(*flag) for flag in flags) == wanted, words
        finally:
            for flag, value in zip(flags, found, strict=True):
                setattr(*flag, value)


def test_a_resumed_run_needs_the_checkpoint_that_was_chosen(data, tmp_path, monkeypatch):
    scores = iter([1.0, 2.0])
    monkeypatch.setattr(select, "energy_score", lambda *_: lambda: next(scores))
    words = ("--steps", "2", "--every", "1", "--select", "energy")
    run = trained(data, tmp_path / "run", *SHORT, *words)
    (run / "best.safetensors").unlink()
    log = (run / "log.csv").read_bytes()
    ended = train("segunify", "-o", run, "--resume", "--steps", "3")
    assert ended.refused(5, "best.safetensors is missing")
    assert (run / "log.csv").read_bytes() == log


def test_a_lack_of_memory_before_the_first_step(data, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    words = ("--data", data, "-o", tmp_path / "run", *SHORT)
    text = "out of memory before the first step; there is no checkpoint yet"
    with monkeypatch.context() as patch:
        patch.setattr(select, "energy_score", fail)
        assert train("segunify", *words, "--select", "energy").refused(1, text, "smaller --batch")
    monkeypatch.setattr(FeatureBatches, "of", fail)
    estimated = [w for w in words if w not in ("--intra-shift", "0.3", "--inter-shift", "0.5")]
    assert train("segunify", *estimated).refused(1, text)


def test_the_versions_name_all_libraries_that_make_features(data, tmp_path):
    import cv2

    def backbone(*words):
        return replace(tiny_backbone(*words), library="transformers 9.8.7")

    words = ("--data", data, *SHORT, "-q", "-o")
    assert train("segunify", *words, tmp_path / "a", backbone=backbone).code == 0
    versions = read_entry(tmp_path / "a")["versions"]
    assert versions["transformers"] == "9.8.7" and versions["opencv"] == cv2.__version__
    assert "transformers" not in read_entry(trained(data, tmp_path / "b", *SHORT))["versions"]


def test_random_numbers_of_the_backbone_do_not_change_the_initial_weights(data, tmp_path):
    """A backbone draws some when it is made, and others in other versions of its library."""

    def other(*words):
        torch.rand(3)
        return tiny_backbone(*words)

    words = ("segunify", "--data", data, *SHORT, "-q", "-o")
    heads = []
    for number, backbone in enumerate((tiny_backbone, other)):
        assert train(*words, tmp_path / str(number), backbone=backbone).code == 0
        heads.append(read_checkpoint(tmp_path / str(number)).module())
    for name, array in heads[0].items():
        np.testing.assert_array_equal(array, heads[1][name], err_msg=name)
