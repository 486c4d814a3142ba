"""Segmenter, streams and the command line with a folder of masks as the prior."""

import json
import pickle

import numpy as np
import pytest
from cases import case
from clips import NAMES, view
from dg_commands import labels_of, picture_file

from runtime.errors import BundleError, InputError
from sdk import MasksPrior, Segmenter
from sdk.__main__ import main
from sdk.image import encode_image
from sdk.prior import make_prior

FRAMES = [view(at) for at in range(3)]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The folders pictures and masks, with the three frames f0 to f2 and their truths."""
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "masks"):
        (tmp_path / name).mkdir()
    for i, (picture, truth) in enumerate(FRAMES):
        picture_file(tmp_path / f"pictures/f{i}.png", picture)
        (tmp_path / f"masks/f{i}.png").write_bytes(encode_image(truth.astype(np.uint8), ".png"))
    return tmp_path


def known(picture):
    """The callable that returns the truth of a frame."""
    return next(truth for frame, truth in FRAMES if (frame == picture).all())


def test_labels_are_those_of_a_callable_with_the_same_guides(folders):
    for refine in ("residual", None):
        with case(refine):
            found = Segmenter("masks", refine=refine)("pictures/f1.png")
            wanted = Segmenter(known, refine=refine)("pictures/f1.png")
            np.testing.assert_array_equal(found.labels, wanted.labels)
            assert found.backend.startswith("masks + ") and found.names is None


def test_names_and_pickles(folders, monkeypatch):
    seg = Segmenter(MasksPrior("masks", names=NAMES), refine=None)
    again, by_path = pickle.loads(pickle.dumps(seg)), Segmenter("masks", refine=None)
    by_path = pickle.loads(pickle.dumps(by_path))
    wanted = seg("pictures/f0.png")
    assert wanted.names == NAMES
    picture = (folders / "pictures/f0.png").absolute()
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(again(picture).labels, wanted.labels)
    assert (by_path(str(picture)).labels >= 0).all()
    assert (seg.submit(picture).result().labels == wanted.labels).all()
    seg.close()


def test_pictures_without_names_are_refused(folders):
    seg = Segmenter("masks")
    path = folders / "pictures/f0.png"
    for source in [FRAMES[0][0], path.read_bytes(), path.open("rb")]:
        with case(type(source)), pytest.raises(InputError, match="needs pictures with names"):
            seg(source)
    with pytest.raises(InputError, match="needs pictures with names"):
        list(seg.stream([FRAMES[0][0]]))


def test_streams_of_folders_and_paths(folders):
    paths = sorted((folders / "pictures").iterdir())
    for source in ("pictures", paths):
        results = [*Segmenter("masks", refine=None).stream(source)]
        assert len(results) == 3
        for result, (_, truth) in zip(results, FRAMES, strict=True):
            assert (result.labels == truth).mean() > 0.95
    (folders / "masks/f1.png").unlink()
    with pytest.raises(InputError, match=r"f1.png has no mask in"):
        list(Segmenter("masks", refine=None).stream("pictures"))


def test_255_is_named_if_it_probably_means_unknown(folders):
    truth = FRAMES[0][1].astype(np.uint8)
    truth[:4] = 255
    (folders / "masks/f0.png").write_bytes(encode_image(truth, ".png"))
    note = "label 255 of the prior is a class here; if it means unknown, say so: --unknown 255"
    assert any(note in w for w in Segmenter("masks", refine=None)("pictures/f0.png").warnings)
    with pytest.raises(InputError, match=r"f0.png has the label 255, and there are 4 n") as caught:
        Segmenter(MasksPrior("masks", names=NAMES))("pictures/f0.png")
    assert "--unknown 255" in caught.value.fix
    result = Segmenter(MasksPrior("masks", unknown=255))("pictures/f0.png")
    assert result.labels.max() == 3 and not result.warnings


def test_other_folders_keep_their_errors(folders):
    (folders / "empty").mkdir()
    with pytest.raises(BundleError, match=r"is no bundle: it has no manifest.json"):
        Segmenter("empty")
    with pytest.raises(InputError, match="is no folder of masks"):
        make_prior("empty")
    (folders / "masks/run.json").write_text("{}")
    with pytest.raises(InputError, match="a run of the trainer, which is not exported"):
        Segmenter("masks")
    (folders / "masks/manifest.json").write_text("{}")
    with pytest.raises(BundleError):
        Segmenter("masks")
    with pytest.raises(InputError, match=r"imgsz is for .onnx priors only"):
        Segmenter("pictures", imgsz=64)


def test_the_command_line(folders, capsys):
    assert main(["predict", "pictures/f0.png", "--prior", "masks", "--no-filter", "-o", "o"]) == 0
    wanted = Segmenter("masks", filter=None)("pictures/f0.png").labels
    np.testing.assert_array_equal(labels_of(folders / "o", "f0"), wanted)
    words = ["predict", "pictures/f0.png", "-o", "o", "--json", "--prior"]
    assert main([*words, "masks", "--unknown", "3"]) == 0
    assert labels_of(folders / "o", "f0").max() == 2
    capsys.readouterr()
    (folders / "names.txt").write_text("\n".join(NAMES))
    for more in (["--names", ",".join(NAMES)], ["--names", "names.txt", "--unknown", "3"]):
        with case(more):
            assert main([*words, "masks", *more]) == 0
            assert json.loads(capsys.readouterr().out)[0]["names"] == NAMES
    for more, match in [
        (["masks", "--names", "a,b"], "masks/f0.png has the label 3, and there are 2 names: a, b"),
        (["masks", "--names", "no.txt"], "names is 'no.txt', which is no list with commas and"),
        (["kmeans", "--names", "a,b"], "are for a folder of masks, and --prior is kmeans"),
        (
            ["gone", "--unknown", "3"],
            "--names and --unknown are for a folder of masks, and --prior is gone",
        ),
    ]:
        with case(more):
            assert main([*words, *more]) == 1
            assert match in capsys.readouterr().err
    assert main(["predict", "pictures/f0.png", "x.png", "--prior", "masks", "-o", "o"]) == 1
