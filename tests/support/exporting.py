"""What the tests of the exporter share: its command line, small networks, pictures."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from export.__main__ import main
from runtime.device.driver import cuda_devices

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx")
torch = pytest.importorskip("torch", reason="networks are exported by torch: pip install torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxslim", reason="needs onnxslim")


ROOT = Path(__file__).parents[2]
SIZE = (64, 96)  # of the small SegFormer; its refinement works at half of it
CAPABILITIES = ("8.6", "8.9", "12.0")
RTX = ("--target", "rtx", "--compute-capability", ",".join(CAPABILITIES))
needs_rtx = pytest.mark.skipif(
    "tensorrt_rtx" not in {d.name for p in sys.path if os.path.isdir(p) for d in os.scandir(p)},
    reason="TensorRT for RTX is not installed: pip install 'dynaguide-edge[rtx]'",
)
no_gpu = pytest.mark.skipif(bool(cuda_devices()), reason="there is a GPU here")


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, code, *texts):
        """It failed in one error with a fix or a value wanted, and said ``texts``."""
        assert self.code == code, self
        assert self.err.count("error: ") == 1 and "Traceback" not in self.err, self.err
        for text in texts:
            assert text in self.err, self.err
        return True


def export(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(w) for w in words])
        except SystemExit as end:
            code = end.code
    return Ended(code, out.getvalue(), err.getvalue())


def files(folder):
    """Everything in a folder, by name."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def graph(bundle, name):
    return onnx.load_from_string(bundle.graph(name))


def tiny_segformer(names, seed):
    """A SegFormer of two small stages, with scores that differ from place to place."""
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        num_attention_heads=[1, 2],
        decoder_hidden_size=16,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = transformers.SegformerForSemanticSegmentation(config)
    for parameter in network.parameters():
        parameter.data.mul_(4)
    return network


def save_checkpoint(folder, change=lambda head: None):
    """A small SegFormer in Hugging Face's format; ``change`` gets its decode head."""
    network = tiny_segformer(["wall", "sky", "grass", "road", "tree"], seed=2)
    with torch.no_grad():
        change(network.decode_head)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        network.save_pretrained(folder)
    height, width = SIZE
    settings = {"size": {"height": height, "width": width}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def freeze_checkpoint(folder, path, **options):
    """Freeze the checkpoint in a folder to an ONNX file; returns ``path``."""
    from export.models.load import load_model
    from export.to_onnx import freeze

    path.write_bytes(freeze(load_model("segformer", folder), **options))
    return path
