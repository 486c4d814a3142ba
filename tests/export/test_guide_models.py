"""Models of python -m export guides that are no networks: k-means, and one that a test makes."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from bundles import tiny_parts
from cases import case
from PIL import Image
from safetensors.numpy import load_file

from export.__main__ import main
from export.guides import __main__ as guides_command
from export.guides.kmeans import KMeansGuides
from export.guides.write import write_guides
from runtime.bundle.write import write_bundle
from runtime.errors import InputError
from runtime.prior.guide_list import GuideList
from runtime.prior.kmeans import KMeansPrior
from sdk import Segmenter


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder with photos/: 0.png to 3.png."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(4):
        blocks = np.random.default_rng(number).integers(0, 256, (3, 4, 3)).astype(np.uint8)
        scene = cv2.resize(blocks, (64, 48), interpolation=cv2.INTER_CUBIC)
        Image.fromarray(scene).save(tmp_path / f"photos/{number}.png")
    return tmp_path


@dataclass(frozen=True)
class Halves:
    """A GuideModel: the left half of a picture is 0, the right one ``right``."""

    right: int = 1
    busy: Any = field(default_factory=threading.Lock)
    name = "halves"
    output = "labels"
    names = None

    def own_guide(self, picture):
        assert self.busy.acquire(blocking=False), "two threads use the model at the same time"
        time.sleep(0.01)
        self.busy.release()
        return np.array([[0, self.right]], np.int32)

    def entry(self):
        return {"kind": "halves", "options": {"right": self.right}, "source": "/x", "names": None}


def add_options(parser):
    parser.add_argument("--right", type=int, default=1)


HALVES = SimpleNamespace(
    add_options=add_options, from_arguments=lambda args: Halves(args.right), __name__="halves"
)


def guides(*words, model="halves", out="masks"):
    return main(["guides", "--model", model, "--data", "photos", "-o", out, "-q", *words])


def test_a_model_has_options_of_its_own(place, monkeypatch, capsys):
    monkeypatch.setitem(guides_command.MODELS, "halves", HALVES)
    assert guides("--right", "-1") == 0
    found = GuideList.read(place / "masks")
    assert found.names is None and len(found.pictures) == 4
    assert found.model == {"name": "halves", "kind": "halves", "options": {"right": -1}}
    np.testing.assert_array_equal(cv2.imread("masks/0.png", cv2.IMREAD_UNCHANGED), [[0, 65535]])
    with pytest.raises(SystemExit):
        main(["guides", "--model", "halves", "--help"])
    assert "--model halves:\n  --right" in capsys.readouterr().out
    for words, model, match in [
        (["--right=2"], "kmeans", "--right is an option of --model halves; --model is kmeans"),
        (["--right", "2"], "x.onnx", "--right is an option of --model halves; --model is x.onnx"),
        (["--names", "a"], "halves", "--names is an option of --model PATH.onnx; --model is halv"),
    ]:
        with case(words, model):
            assert guides(*words, model=model, out="other") == 1
            assert match in capsys.readouterr().err


def test_all_that_decides_the_values_must_be_the_same(place):
    write_guides(Halves(1), Path("photos"), Path("masks"))
    assert write_guides(Halves(1), Path("photos"), Path("masks")).skipped == 4
    with pytest.raises(
        InputError, match=r"contains guides of halves, .* halves: right is 2, not 1\n"
    ):
        write_guides(Halves(2), Path("photos"), Path("masks"))
    Path("empty").mkdir()
    none = GuideList({"name": "halves", "kind": "other"}, {"soft": False}, None)
    Path("empty/guides.json").write_bytes(none.to_json())  # where all pictures were broken
    assert not write_guides(Halves(1), Path("photos"), Path("empty")).broken
    assert GuideList.read(Path("empty")).model["kind"] == "halves"
    listed = json.loads(Path("masks/guides.json").read_text())
    listed["model"]["threshold"] = 1
    Path("masks/guides.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"halves: threshold is None, not 1\n"):
        write_guides(Halves(1), Path("photos"), Path("masks"))


def test_workers_share_one_model(place):
    assert write_guides(Halves(), "photos", "masks", workers=4).pictures == 4


def test_unknown_pixels_of_probabilities(place, monkeypatch):
    guide = np.array([[[0.25, 0.75], [0, 0], [0.5, 0.5]]], np.float32)
    monkeypatch.setattr(Halves, "own_guide", lambda self, picture: guide)
    monkeypatch.setattr(Halves, "output", "probabilities")
    write_guides(Halves(), Path("photos"), Path("masks"))
    stored = cv2.imread("masks/0.png", cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(stored, [[1, 65535, 0]])
    write_guides(Halves(), Path("photos"), Path("soft"), soft=True)
    found = load_file("soft/0.safetensors")["probabilities"]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, guide)


def test_one_document_of_json(place, monkeypatch, capsys):
    monkeypatch.setitem(guides_command.MODELS, "halves", HALVES)
    Path("photos/x.png").write_bytes(b"no picture")
    assert guides("--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert "x.png is not a picture" in found.pop("broken")["x.png"]
    counts = {"pictures": 5, "written": 4, "unchanged": 0}
    assert found == {"masks": "masks", "warnings": []} | counts
    assert guides("--json", "--right", "3") == 1
    found = json.loads(capsys.readouterr().out)
    assert "right is 3, not 1" in found["error"] and found["fix"]


def test_a_guide_that_is_none_is_the_error_of_its_picture(place):
    done = write_guides(Halves(-7), Path("photos"), Path("masks"))
    assert "photos/2.png: guide has labels from -7 to 0" in str(done.broken["2.png"])


def test_kmeans_writes_the_labels_of_each_picture(place, capsys):
    assert guides("--clusters", "3", model="kmeans") == 0
    found = GuideList.read(place / "masks")
    assert found.names is None
    assert found.model == {"name": "kmeans", "kind": "kmeans", "clusters": 3, "output": "labels"}
    picture = np.asarray(Image.open("photos/1.png"))
    model = KMeansGuides(KMeansPrior(3))
    labels = cv2.imread("masks/1.png", cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(labels, model.own_guide(picture))
    assert set(np.unique(labels)) == {0, 1, 2}
    assert Segmenter("masks")("photos/1.png").names is None
    assert guides("--clusters", "4", model="kmeans") == 1
    assert "clusters is 4, not 3" in capsys.readouterr().err
    assert guides("--clusters", "0", model="kmeans", out="m") == 1
    assert "clusters is 0; wanted 1 to 256" in capsys.readouterr().err
    assert guides("--soft", model="kmeans", out="m") == 1
    assert "kmeans returns labels, and soft guides are prob" in capsys.readouterr().err


def test_a_bundle_of_kmeans_names_the_model(place, capsys):
    write_bundle(place / "k.bundle", *tiny_parts())
    assert guides(model="k.bundle") == 1
    err = capsys.readouterr().err
    assert "k.bundle is a bundle of k-means\n  fix: --model kmeans --clusters 3\n" in err


def test_the_help_and_kmeans_import_no_torch():
    code = (
        "import sys\nfrom export.guides.__main__ import MODELS, command\n"
        "for words in [], *(['--model', name] for name in MODELS):\n"
        "    try: command([*words, '--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
