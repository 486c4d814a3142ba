"""The loop: what it computes, what it keeps after an error, and the choice of the checkpoint."""

import csv
import json
import os
import resource
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
from training import TINY, draw_pictures, tiny_backbone, torch, train, trained

from export.train import loop, select
from export.train.config import LoopConfig
from export.train.loop import seed_torch
from export.train.run import BEST, open_run, read_checkpoint, read_entry
from export.train.segunify import SegUnify
from runtime.errors import InputError

SHORT = (*TINY, "--steps", "6", "--every", "2", "--log-every", "1", "--batch", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("loop") / "pictures", 10)


def rows(run):
    return list(csv.DictReader((run / "log.csv").open()))


def files(run):
    return {p.name for p in run.iterdir()}


def test_the_steps_equal_a_plain_loop(data, tmp_path):
    """The loop in eight lines, with the same seeds and batches."""
    from export.train.features import FeatureBatches
    from export.train.segunify import from_settings
    from export.train.views import ViewRule

    run = open_run(trained(data, tmp_path / "run", *SHORT, "--seed", "5"))
    rule, losses = ViewRule(size=32), []
    batches = FeatureBatches(
        sorted(data.iterdir()), rule, tiny_backbone(), batch=3, seed=5, device="cpu"
    )
    seed_torch(5, 0)
    method = from_settings(run.entry["settings"], 6)
    optimiser = method.optimiser(1e-4)
    for step, features in enumerate(batches.batches(0, 6), 1):
        seed_torch(5, step)
        terms = method.losses(features)
        optimiser.zero_grad()
        sum(terms.values()).backward()
        method.before_update()
        optimiser.step()
        losses.append(sum(float(term.detach()) for term in terms.values()))
    for name, array in run.head()[0].items():
        assert np.array_equal(method.module.state_dict()[name].numpy(), array), name
    assert [float(row["loss"]) for row in rows(run.folder)] == pytest.approx(losses, rel=1e-6)


def test_the_title_of_the_curves(data, tmp_path):
    titles = []
    words = ("--data", data, "-o", tmp_path / "run", *SHORT, "--steps", "2", "--every", "1")
    ended = train("segunify", *words, curves=lambda _log, _out, title: titles.append(title))
    assert ended.code == 0, ended.err
    assert titles == ["segunify, 1 step", "segunify, 2 steps"]


def test_the_seeds_differ_by_seed_and_by_number():
    drawn = set()
    for seed, number in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2**32), (2**32 - 1, 10**9)]:
        seed_torch(seed, number)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 6


def test_the_head_does_not_depend_on_checkpoints_and_logs(data, tmp_path):
    first = open_run(trained(data, tmp_path / "a", *SHORT)).head()[0]
    words = ("--every", "5", "--log-every", "4")
    other = trained(data, tmp_path / "b", *SHORT, *words)
    assert all(np.array_equal(first[k], v) for k, v in open_run(other).head()[0].items())
    assert [row["step"] for row in rows(other)] == ["4", "5", "6"]


def test_bf16_computes_the_losses_under_autocast(data, tmp_path, monkeypatch):
    seen = []
    losses = SegUnify.losses

    def record(self, features):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return losses(self, features)

    monkeypatch.setattr(SegUnify, "losses", record)
    half = open_run(trained(data, tmp_path / "a", *SHORT, "--precision", "bf16"))
    assert seen == 6 * [(True, torch.bfloat16)]
    seen.clear()
    whole = open_run(trained(data, tmp_path / "b", *SHORT))
    assert {enabled for enabled, _ in seen} == {False}
    head, other = half.head()[0], whole.head()[0]
    assert head["student"].dtype == np.float32
    assert not np.array_equal(head["student"], other["student"])


def at_step(number, change):
    """SegUnify.losses, whose terms are changed in one step."""
    losses, count = SegUnify.losses, 0

    def changed(self, features):
        nonlocal count
        count += 1
        terms = losses(self, features)
        return change(terms) if count == number else terms

    return changed


def test_a_loss_that_is_not_finite(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(SegUnify, "losses", at_step(5, lambda t: t | {"data": t["data"] / 0}))
    ended = train("segunify", "--data", data, "-o", run, *SHORT)
    text = "the last checkpoint is kept"
    assert ended.refused(1, text)
    text = "the loss is not finite in step 5: within"
    fix = "a smaller --lr and another -o\n"
    assert ended.refused(1, text, "data inf", fix) and "bf16" not in ended.err
    assert read_checkpoint(run).step == 4 and rows(run)[-1]["step"] == "4"
    monkeypatch.undo()
    assert train("segunify", "-o", run, "--resume", "-q").code == 0


def test_a_loss_that_is_not_finite_in_the_first_step(data, tmp_path, monkeypatch):
    """No learning rate has changed it."""
    for number, words in enumerate([(), ("--precision", "bf16")]):
        monkeypatch.setattr(SegUnify, "losses", at_step(1, lambda t: t | {"data": t["data"] / 0}))
        run = tmp_path / str(number)
        ended = train("segunify", "--data", data, "-o", run, *SHORT, *words)
        monkeypatch.undo()
        assert ended.refused(1, "in step 1: ", "there is no checkpoint yet", "the weights of")
        assert "--lr" not in ended.err and ("fp32" in ended.err) == bool(words)


@pytest.mark.parametrize(("kind", "name"), [("energy", "energy"), ("labels", "mIoU")])
def test_a_score_that_is_not_finite(data, tmp_path, monkeypatch, kind, name):
    values = iter([1.0, float("nan")])
    monkeypatch.setattr(select, f"{kind}_score", lambda *_: lambda: next(values))
    words = ("--select", kind, "--holdout", "0.2")
    if kind == "labels":
        words += ("--labels", tmp_path, "--classes", tmp_path)
    ended = train("segunify", "--data", data, "-o", tmp_path / "run", *SHORT, *words)
    text = f"the {name} of the held-out pictures is nan after step 4; the last checkpoint is kept"
    assert ended.refused(1, text, "smaller --lr")
    assert read_checkpoint(tmp_path / "run").step == 2


def spoil(terms):
    return terms | {"data": terms["data"] * torch.tensor(1e38)}


def test_weights_that_are_not_finite_replace_no_checkpoint(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(SegUnify, "losses", at_step(4, spoil))
    ended = train("segunify", "--data", data, "-o", run, *SHORT)
    assert ended.refused(1, "after step 4; the last checkpoint is kept", "--lr and another -o\n")
    assert read_checkpoint(run).step == 2


def test_after_an_error_before_the_first_checkpoint_the_fix_works(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for number, change in ((3, lambda t: t | {"data": t["data"] / 0}), (9, spoil)):
        monkeypatch.setattr(SegUnify, "losses", at_step(number, change))
        words = ("segunify", "--data", data, "-o", run, *SHORT, "--steps", "9", "--every", "9")
        ended = train(*words)
        monkeypatch.undo()
        assert ended.refused(1, "there is no checkpoint yet", "again with a smaller --lr\n")
        assert {"run.json", "log.csv"} <= files(run)
    assert train(*words, "--lr", "1e-5").code == 0 and read_entry(run)["loop"]["lr"] == 1e-5
    assert [row["step"] for row in rows(run)] == [*map(str, range(1, 10))]


def raises(error):
    def change(terms):
        raise error

    return change


@pytest.mark.parametrize(
    ("error", "code", "texts"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
            1,
            ("out of memory in step 3", "smaller --batch or --imgsz"),
        ),
        (
            RuntimeError("CUDA driver: an illegal access\nmore"),
            1,
            ("the GPU failed in step 3", "--resume"),
        ),
        (RuntimeError("cuDNN: CUDNN_STATUS_X"), 1, ("the GPU failed in step 3: cuDNN",)),
        (MemoryError(), 1, ("out of memory",)),
        (InputError("wrong", fix="mend it"), 1, ("wrong", "mend it")),
        (KeyboardInterrupt(), 130, ("interrupted",)),
    ],
    ids=["memory", "GPU", "cuDNN", "MemoryError", "own", "second Ctrl-C"],
)
def test_an_error_in_a_step_keeps_the_last_checkpoint(
    data, tmp_path, monkeypatch, error, code, texts
):
    run = tmp_path / "run"
    monkeypatch.setattr(SegUnify, "losses", at_step(3, raises(error)))
    assert train("segunify", "--data", data, "-o", run, *SHORT).refused(code, *texts)
    assert read_checkpoint(run).step == 2


def test_an_error_in_the_first_step_leaves_no_run(data, tmp_path, monkeypatch):
    error = RuntimeError("can't allocate memory")
    monkeypatch.setattr(SegUnify, "losses", at_step(1, raises(error)))
    ended = train("segunify", "--data", data, "-o", tmp_path / "run", *SHORT)
    assert ended.refused(1, "out of memory in step 1; there is no checkpoint yet")
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_a_method_is_not_hidden(data, tmp_path, monkeypatch):
    monkeypatch.setattr(SegUnify, "losses", at_step(3, raises(RuntimeError("a mistake"))))
    with pytest.raises(RuntimeError, match="a mistake"):
        train("segunify", "--data", data, "-o", tmp_path / "run", *SHORT)


@contextmanager
def largest_file(size):
    """No file can be larger in the block, as on a disk that becomes full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_are_on_the_disk_before_they_are_used(data, tmp_path, monkeypatch):
    """Of the log, the rows up to a checkpoint."""
    synced, renamed, sync, replace = [], [], os.fsync, os.replace

    def note(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def rename(source, target):
        assert os.stat(source).st_ino == synced[-1], target
        renamed.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", rename)
    run = trained(data, tmp_path / "run", *SHORT)
    assert renamed == ["run.json", *["checkpoint.safetensors"] * 3]
    assert synced.count((run / "log.csv").stat().st_ino) == 3


def test_a_full_disk_keeps_the_last_checkpoint(data, tmp_path):
    run = trained(data, tmp_path / "run", *SHORT)
    before = (run / "checkpoint.safetensors").read_bytes()
    words = ("segunify", "-o", run, "--resume", "--steps", "9", "-q")
    with largest_file(2000):  # the log and run.json are smaller
        ended = train(*words)
    assert ended.refused(1, "checkpoint.safetensors cannot be written: File too large")
    assert (run / "checkpoint.safetensors").read_bytes() == before
    assert not [name for name in files(run) if name.startswith(".")]
    with largest_file(100):
        assert train(*words).refused(1, "cannot be written: File too large")
    assert train(*words).code == 0
    assert open_run(run).checkpoint.step == 9
    assert [row["step"] for row in rows(run)] == [str(n) for n in range(1, 10)]


def test_a_broken_picture_is_skipped_and_named(tmp_path):
    data = draw_pictures(tmp_path / "pictures", 24, broken=[7])
    run = tmp_path / "run"
    words = (*TINY, "--every", "8", "--batch", "6", "--json")
    ended = train("segunify", "--data", data, "-o", run, *words, "--steps", "8")
    assert ended.code == 0 and ended.err.count("WARNING: ") == 1 and "07.png" in ended.err
    assert [*json.loads(ended.out)["broken"]] == [str(data / "07.png")]
    again = train("segunify", "-o", run, "--resume", "--steps", "12", *words[-1:])
    assert again.code == 0 and "07.png" not in again.err
    assert json.loads(again.out)["broken"] == json.loads(ended.out)["broken"]
    moved = data.rename(tmp_path / "moved")
    again = train("segunify", "-o", run, "--resume", "--steps", "16", *words[-1:])
    assert again.code == 1 and "--data FOLDER" in again.out
    again = train("segunify", "-o", run, "--resume", "--steps", "16", "--data", moved)
    assert again.code == 0 and "07.png" not in again.err and again.out.count("07.png") == 1
    assert [*read_checkpoint(run).state["broken"]] == [str(moved / "07.png")]
    assert read_entry(run)["data"] == [str(moved)]
    data = moved
    whole = trained(data, tmp_path / "whole", *words[:-1], "--steps", "16")
    ours, other = open_run(run).head()[0], open_run(whole).head()[0]
    assert all(np.array_equal(ours[name], other[name]) for name in other)


def test_a_broken_held_out_picture_is_named(data, tmp_path):
    words = ("--select", "energy", "--holdout", "0.4", "--json")
    from export.train.select import split

    copies = draw_pictures(tmp_path / "pictures", 10)
    held = split(sorted(copies.iterdir()), 0.4, 0)[1]
    held[0].write_bytes(b"broken")
    ended = train("segunify", "--data", copies, "-o", tmp_path / "run", *SHORT, *words)
    assert ended.code == 0, ended.err
    assert [*json.loads(ended.out)["broken"]] == [str(held[0])]
    assert [*read_checkpoint(tmp_path / "run").state["broken"]] == [str(held[0])]
    ended = train("segunify", "-o", tmp_path / "run", "--resume", "--steps", "7")
    assert ended.code == 0 and "WARNING" not in ended.err
    assert f"skipped  1 broken picture: {held[0]}" in ended.out


def energies(monkeypatch, values):
    """The energies of the held-out pictures are ``values``, one after the other."""
    left = iter(values)
    monkeypatch.setattr(SegUnify, "held_out", lambda self, features: next(left))


def test_the_lowest_energy_is_selected(data, tmp_path, monkeypatch):
    words = ("--select", "energy", "--holdout", "0.2")
    energies(monkeypatch, [3.0, 1.0, 2.0])
    run = tmp_path / "run"
    ended = train("segunify", "--data", data, "-o", run, *SHORT, *words)
    assert ended.code == 0 and "selected step 4: energy 1 on held-out pictures" in ended.out
    assert [row["held_out"] for row in rows(run)] == ["", "3", "", "1", "", "2"]
    found = open_run(run)
    assert found.head()[1] == 4 and found.entry["loop"]["select"] == "energy"
    assert read_checkpoint(run).state["best"] == {"step": 4, "value": 1.0}
    best, last = read_checkpoint(run, BEST).module(), read_checkpoint(run).module()
    assert not np.array_equal(best["student"], last["student"])


def test_the_best_checkpoint_is_remembered_when_a_run_is_resumed(data, tmp_path, monkeypatch):
    words = ("--select", "energy", "--holdout", "0.2", "--steps", "2")
    energies(monkeypatch, [1.0, 2.0, 0.5])
    run = trained(data, tmp_path / "run", *SHORT, *words)
    for steps, best in [("4", 2), ("6", 6)]:
        assert train("segunify", "-o", run, "--resume", "--steps", steps, "-q").code == 0
        assert open_run(run).head()[1] == best


@pytest.mark.parametrize(("kind", "last"), [("energy", 2.0), ("labels", 0.5)])
def test_of_equal_scores_the_first_is_selected(data, tmp_path, monkeypatch, kind, last):
    values = iter([1.0, 1.0, last])
    monkeypatch.setattr(select, f"{kind}_score", lambda *_: lambda: next(values))
    words = ("--select", kind, "--holdout", "0.2")
    if kind == "labels":
        words += ("--labels", tmp_path, "--classes", tmp_path)
    assert open_run(trained(data, tmp_path / "run", *SHORT, *words)).head()[1] == 2


def test_an_end_between_the_best_checkpoint_and_the_last_one(data, tmp_path, monkeypatch):
    """The last one is the chosen one then, and is copied when the run is resumed."""
    energies(monkeypatch, [3.0, 1.0, 2.0])
    written, write = [], loop.write_checkpoint

    def end(*arguments):
        written.append(arguments)
        if len(written) == 4:  # the second file of step 4
            raise KeyboardInterrupt
        write(*arguments)

    run = tmp_path / "run"
    words = ("--data", data, "-o", run, *SHORT, "--select", "energy", "--holdout", "0.2")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_checkpoint", end)
        assert train("segunify", *words).code == 130
    assert (read_checkpoint(run).step, read_checkpoint(run, BEST).step) == (4, 2)
    chosen = read_checkpoint(run)
    assert open_run(run).head()[1] == 4
    assert train("segunify", "-o", run, "--resume", "-q").code == 0
    assert open_run(run).head()[1] == 4 and open_run(run).done == 6
    best = read_checkpoint(run, BEST)
    assert best.state == chosen.state
    assert all(np.array_equal(best.tensors[k], v) for k, v in chosen.tensors.items())


def test_an_end_before_the_last_checkpoint_keeps_the_older_best_one(data, tmp_path, monkeypatch):
    energies(monkeypatch, [3.0, 1.0])
    run, written, write = tmp_path / "run", [], loop.write_checkpoint

    def end(*arguments):
        written.append(arguments)
        if len(written) == 3:  # the first file of step 4
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(loop, "write_checkpoint", end)
    words = ("--data", data, "-o", run, *SHORT, "--select", "energy", "--holdout", "0.2")
    assert train("segunify", *words).code == 130
    assert open_run(run).head()[1] == read_checkpoint(run, BEST).step == 2


def test_held_out_pictures_are_not_trained_on(data, tmp_path, monkeypatch):
    """Their features are those of the energy, and no batch has one of them."""
    trained_on, held = set(), set()
    losses = SegUnify.losses

    def seen(place, result):
        def record(self, features):
            place.update(f.numpy().tobytes() for f in features)
            return result(self, features)

        return record

    monkeypatch.setattr(SegUnify, "losses", seen(trained_on, losses))
    monkeypatch.setattr(SegUnify, "held_out", seen(held, lambda self, features: 0.0))
    words = ("--select", "energy", "--holdout", "0.3", "--crops", "five", "--steps", "12")
    trained(data, tmp_path / "run", *SHORT, *words)
    assert len(held) == 3 * 5 and len(trained_on) == 7 * 5 and not held & trained_on


@pytest.fixture
def labelled(data, tmp_path):
    """Options that select by labels of two classes."""
    labels = tmp_path / "labels"
    labels.mkdir()
    for number, path in enumerate(sorted(data.iterdir())):
        assert cv2.imwrite(str(labels / path.name), np.full((32, 40), number % 2, np.uint8))
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    words = ("--select", "labels", "--holdout", "0.4", "--labels", labels)
    return (*words, "--classes", tmp_path / "classes.txt")


def test_the_highest_miou_is_selected_and_the_labels_are_named(
    data, labelled, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    ended = train("segunify", "--data", data, "-o", run, *SHORT, *labelled)
    assert ended.code == 0, ended.err
    scores = {row["step"]: float(row["held_out"]) for row in rows(run) if row["held_out"]}
    assert set(scores) == {"2", "4", "6"} and all(0 < score <= 1 for score in scores.values())
    best = read_checkpoint(run).state["best"]
    assert best["value"] == pytest.approx(max(scores.values()))
    assert f"selected step {best['step']}: mIoU" in ended.out
    loop = open_run(run).entry["loop"]
    assert (loop["select"], loop["labels"]) == ("labels", str(tmp_path / "labels"))
    assert train("segunify", "-o", run, "--resume", "--steps", "8").code == 0

    values = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(select, "labels_score", lambda *_: lambda: next(values))
    other = trained(data, tmp_path / "other", *SHORT, *labelled)
    assert open_run(other).head()[1] == 4


def test_the_miou_is_that_of_the_present_head(data, labelled, tmp_path, monkeypatch):
    heads = []

    def counted(network, *_):
        heads.append(network.head.student.detach().clone())
        return np.eye(2, dtype=np.int64)

    monkeypatch.setattr("export.train.matching.confusion_of", counted)
    run = trained(data, tmp_path / "run", *SHORT, *labelled)
    assert len(heads) == 4 and not torch.equal(heads[0], heads[1])
    assert np.array_equal(heads[-1].numpy(), read_checkpoint(run).module()["student"])


def test_unusable_labels_are_reported_before_the_training(data, labelled, tmp_path):
    words = ("--data", data, "-o", tmp_path / "run", *SHORT, *labelled)
    (tmp_path / "classes.txt").write_text('{"7": "car"}')
    assert train("segunify", *words).refused(1, "no pixel of the pictures has one of the classes")
    assert not (tmp_path / "run").exists()


def test_the_labels_do_not_change_the_training(data, labelled, tmp_path):
    """The head of the last step is that of --select energy, which has no labels."""
    one = trained(data, tmp_path / "one", *SHORT, "--select", "energy", "--holdout", "0.4")
    two = trained(data, tmp_path / "two", *SHORT, *labelled)
    head = read_checkpoint(one).module()
    assert all(np.array_equal(head[k], v) for k, v in read_checkpoint(two).module().items())


def test_features_are_stored_only_with_a_cache(data, tmp_path):
    words = [word for word in SHORT if word != "--no-cache"]
    cache = tmp_path / "cache"
    command = ("segunify", "--data", data, *words, "--cache", cache, "-q")
    first = train(*command, "-o", tmp_path / "a")
    assert first.code == 0 and len([*cache.rglob("*.safetensors")]) == 10
    assert train(*command, "-o", tmp_path / "b").code == 0
    none = trained(data, tmp_path / "c", *SHORT)
    heads = [open_run(run).head()[0] for run in (tmp_path / "a", tmp_path / "b", none)]
    for name, array in heads[0].items():
        assert all(np.array_equal(head[name], array) for head in heads)


def test_the_number_of_threads_is_recorded(data, tmp_path, monkeypatch):
    monkeypatch.setattr("export.train.start.default_threads", lambda: 2)
    before = torch.get_num_threads()
    words = [*SHORT]
    del words[words.index("--threads") : words.index("--threads") + 2]
    try:
        torch.set_num_threads(2)
        command = ("segunify", "--data", data, "-o", tmp_path / "run", *words, "-q")
        assert train(*command).code == 0
        assert open_run(tmp_path / "run").entry["loop"]["threads"] == 2
        torch.set_num_threads(1)
        more = train("segunify", "-o", tmp_path / "run", "--resume", "--steps", "7", "-q")
        assert more.code == 0 and "changed" not in more.err
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_settings_of_the_loop_check_themselves():
    assert LoopConfig().steps == 3000
    for name, value in [("steps", True), ("every", 0), ("log_every", 1.5), ("threads", 0)]:
        with pytest.raises(InputError, match=f"{name.replace('_', '-')} is"):
            LoopConfig(**{name: value})
    for name, value in [("workers", -1), ("lr", "1"), ("lr", float("inf")), ("select", "best")]:
        with pytest.raises(InputError, match=f"{name} is"):
            LoopConfig(**{name: value})
    assert LoopConfig(select="energy", holdout=0.5).holdout == 0.5
    for holdout in (0.0, 0.51):
        with pytest.raises(InputError, match=f"holdout is {holdout}; wanted above 0, at most 0.5"):
            LoopConfig(select="energy", holdout=holdout)
    largest = {"batch": 4096, "seed": 2**32 - 1, "workers": 256, "threads": 1024, "lr": 1e6}
    assert LoopConfig(**largest)
    for name, value in largest.items():
        with pytest.raises(InputError, match=f"{name} is {value + 1}; wanted"):
            LoopConfig(**{name: value + 1})
    with pytest.raises(InputError, match="select labels needs the folder"):
        LoopConfig(select="labels", holdout=0.5, labels="x")
