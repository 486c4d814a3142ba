"""Settings of a refinement that differ from those that a bundle's weights were trained with."""

from dataclasses import replace

import pytest
from bundles import CONFIG, picture, tiny_parts
from cases import case

from runtime.bundle.manifest import seal
from runtime.bundle.write import write_bundle
from sdk import Segmenter


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose weights were trained, as its graph cnn says."""
    manifest, files = tiny_parts(with_network=True)
    files["cnn.onnx"] = files["refine_map.onnx"]
    manifest["graphs"]["cnn"] = manifest["graphs"]["refine_map"] | {"file": "cnn.onnx"}
    write_bundle(tmp_path / "city.bundle", seal(manifest), files)
    return tmp_path / "city.bundle"


def test_other_settings_are_a_warning(bundle):
    start = (
        "The refinement starts from the weights of city.bundle, which were trained with other "
        "settings: "
    )
    end = ". Leave these settings out; the number of steps may differ."
    for config, words in (
        (replace(CONFIG, scale=0.5), "scale is 0.5, not 1.0"),
        (replace(CONFIG, steps=1, lr=0.1, lam=2.0), "lr is 0.1, not 0.05, lam is 2.0, not 4.0"),
        (replace(CONFIG, max_pixels=100), "max_pixels is 100, not 262144"),
    ):
        with case(words):
            seg = Segmenter(bundle, refine=config, self_test="never")
            for segmenter in (seg, seg.clone()):
                result = segmenter(picture())
                assert result.stats["start"] == "trained"
                assert result.warnings == [start + words + end]


def test_settings_that_may_differ(bundle, tmp_path):
    for config in (CONFIG, replace(CONFIG, steps=1), replace(CONFIG, blocks=3, lr=0.1), None):
        with case(config):
            assert Segmenter(bundle, refine=config, self_test="never")(picture()).warnings == []
    manifest, files = tiny_parts(with_network=True)
    cold = write_bundle(tmp_path / "cold", manifest, files)
    seg = Segmenter(cold, refine=replace(CONFIG, lr=0.1, seed=3), self_test="never")
    assert seg(picture()).warnings == [] and seg.info()["start"] == "cold"
