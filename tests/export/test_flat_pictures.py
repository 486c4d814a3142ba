"""The network's input of pictures whose colours hardly differ: small deviations are raised."""

import numpy as np
import pytest
from cases import case

torch = pytest.importorskip("torch", reason="the network is one of torch: pip install torch")

from export.models.refinement import inputs  # noqa: E402 (after importorskip)
from runtime.core import reference  # noqa: E402


def test_deviations_below_a_thousandth_are_raised_to_it():
    signs = np.float64([[-1, 1, 1, -1], [1, -1, -1, 1]])[..., None].repeat(3, 2)
    for deviation, wanted in ((2e-3, 1), (1e-3, 1), (5e-4, 0.5), (0, 0)):
        image = 0.5 + deviation * signs
        ours = inputs(torch.from_numpy(image.transpose(2, 0, 1))[None])[0, :3].numpy()
        with case(deviation):
            np.testing.assert_allclose(ours.transpose(1, 2, 0), wanted * signs, atol=1e-9)
            found = reference.residual_input(image)[..., :3]
            np.testing.assert_allclose(found, wanted * signs, atol=1e-9)
