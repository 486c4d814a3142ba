"""Which text names which backbone, weights that are refused, and what a Backbone checks."""

import hashlib
import json
import pickle
import sys

import pytest

torch = pytest.importorskip("torch", reason="backbones are networks of torch")

from export.backbones import Backbone  # noqa: E402
from export.backbones.load import load_backbone  # noqa: E402
from export.backbones.weights import read_weights  # noqa: E402
from runtime.errors import BundleError, InputError, MissingBackend  # noqa: E402


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("efficientnet_lite0", r"fix: did you mean --backbone efficientnet-lite0\?"),
        ("facebook/dino-vits16", r"nothing is downloaded\n  fix: .*hf download facebook/dino-vits"),
        ("https://a:secret@b.c/x.pth", r"(?s)^(?!.*secret).*fix: download it, and name the folder"),
        ("nothing.pth", r"'nothing.pth'; wanted efficientnet-lite0, a checkpoint folder, or a fil"),
        ("resnet18", r"fix: --backbone efficientnet-lite0$"),
    ],
)
def test_a_text_that_names_nothing_is_refused(text, match):
    with pytest.raises(InputError, match=match):
        load_backbone(text)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.zip").write_text("a")
    with pytest.raises(InputError, match=r"a.zip, a file; wanted one that ends in .pth, .pt, .bin"):
        load_backbone(str(tmp_path / "a.zip"))


def test_a_missing_torch_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingBackend, match=r"(?s)PyTorch, which cannot be imported.*\[train\]"):
        load_backbone("efficientnet-lite0")


def test_a_removed_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InputError, match="the current folder was removed"):
        load_backbone("efficientnet-lite0")


# Files of weights


class Hostile:
    def __reduce__(self):
        return print, ("this must not run",)


def test_hostile_and_damaged_files_are_refused(tmp_path, capsys, recwarn):
    good = tmp_path / "good.pth"
    torch.save({"a": torch.zeros(500)}, good)
    torch.save({"a": Hostile()}, tmp_path / "hostile.pth", pickle_protocol=4)
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"a": Hostile()}, 4))
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 40)
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    (tmp_path / "lfs.pth").write_bytes(lfs)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"a": 3}, tmp_path / "number.pth")
    torch.save({}, tmp_path / "nothing.pth")
    for name, match in (
        ("hostile.pth", "loading it could run code in it"),
        ("pickle.pth", "loading it could run code in it"),
        ("cut.pth", "cut.pth cannot be read: "),
        ("empty.pth", "empty.pth cannot be read: "),
        ("noise.safetensors", "noise.safetensors cannot be read: "),
        ("lfs.pth", "a Git LFS pointer"),
        ("list.pth", "contains a list; wanted a state dict"),
        ("number.pth", "contains a int as 'a'; wanted a state dict"),
        ("nothing.pth", "contains nothing; wanted a state dict"),
    ):
        with pytest.raises(BundleError, match=match):
            load_backbone(str(tmp_path / name))
    assert "must not run" not in capsys.readouterr().out and not recwarn


def test_a_folder_of_weights_is_no_file(tmp_path):
    with pytest.raises(InputError, match="is a folder, wanted a file of weights"):
        read_weights(tmp_path)


def test_the_hash_is_that_of_the_file(tmp_path):
    torch.save({"state_dict": {"a": torch.arange(3)}}, tmp_path / "a.pth")
    state, sha256 = read_weights(tmp_path / "a.pth")
    assert state["a"].tolist() == [0, 1, 2]
    assert sha256 == hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()


# Backbone

GOOD = {
    "name": "tiny", "module": torch.nn.Identity(), "channels": 3, "stride": 1, "mean": (0.5,) * 3,
    "std": (0.5,) * 3, "source": "tiny", "features": "all", "sha256": "0" * 64,
}  # fmt: skip


def test_a_backbone_checks_itself():
    for wrong, match in (
        ({"channels": 0}, "channels is 0; wanted 1 to"),
        ({"stride": 1.5}, "stride is 1.5; wanted a whole number"),
        ({"mean": (0.5, 0.5)}, r"mean of tiny is \(0.5, 0.5\); wanted three numbers"),
        ({"std": (1.0, float("nan"), 1.0)}, "std of tiny is .*; wanted three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std of tiny is .*; wanted numbers above 0"),
    ):
        with pytest.raises(InputError, match=match):
            Backbone(**GOOD | wrong)


def test_the_entry_is_json_and_the_key_changes_with_the_features():
    backbone = Backbone(**GOOD)
    assert json.loads(json.dumps(backbone.entry())) == backbone.entry()
    changes = ({"features": "b"}, {"sha256": "1" * 64}, {"std": (1.0,) * 3}, {"padding": "same"})
    more = ({"name": "b"}, {"mean": (0.5, 0.5, 0.4)}, {"library": "transformers 5.1"})
    for change in (*changes, *more):
        assert Backbone(**GOOD | change).key != backbone.key, change
