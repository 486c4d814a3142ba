"""Fixtures of the tests of bundles.

Modules that need onnx are imported by the fixtures that use them, because a test that does not
need it can run without it.
"""

import pytest


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """name -> (manifest, files with the manifest's own, by path)."""
    from bundles import tiny_bundle

    out = {}
    for name in ("kmeans", "network"):
        folder = tmp_path_factory.mktemp("pristine") / name
        bundle = tiny_bundle(folder, with_network=name == "network")
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
        assert len(files) == (8 if name == "network" else 7)
        out[name] = (bundle.manifest, files)
    return out


@pytest.fixture
def place(tmp_path):
    """Where a bundle goes, beside things that must stay as they are."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.bin").write_bytes(b"keep me")
    return tmp_path / "x.bundle"
