"""Priors and presets of little work, and comparisons of results."""

from dataclasses import replace

import numpy as np

from sdk import RefineConfig

NAMES = ["grass", "sky", "road", "sea"]


def one_hot(truth, classes=4, sure=0.9):
    soft = np.full((*truth.shape, classes), (1 - sure) / (classes - 1), np.float32)
    np.put_along_axis(soft, truth[..., None], sure, -1)
    return soft


def prior_of(guide, names=None):
    """A callable prior that gives ``guide`` whatever it sees."""

    def prior(picture):
        return guide

    if names is not None:
        prior.names = names
    return prior


def few_steps(name):
    """A preset that takes little time."""
    if name is None:
        return None
    config = RefineConfig.preset(name)
    return config if config.objective == "residual" else replace(config, steps=3)


def assert_same(a, b):
    assert np.array_equal(a.labels, b.labels) and np.array_equal(a.regions, b.regions)
    assert np.array_equal(a.confidence, b.confidence) and np.array_equal(a.image, b.image)
