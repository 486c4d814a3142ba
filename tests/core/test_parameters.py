"""runtime/core/parameters.py: a state that does not fit is refused with a fix."""

import numpy as np
import pytest
from cases import case

from runtime.core.options import RefineOptions
from runtime.core.parameters import flatten, initial_state, select_classes
from runtime.errors import InputError

OPTIONS = RefineOptions(channels=4)


def test_a_counter_is_one_whole_number():
    state, name = initial_state(OPTIONS, 3), "bn1.num_batches_tracked"
    for wrong in (np.array([5]), np.array(5.0), np.array(np.nan), np.array(True), np.array(-1),
                  np.array(2**63, np.uint64)):  # fmt: skip
        message = (
            r"state 'bn1\.num_batches_tracked' is array\(.*; wanted a whole number of shape \(\)"
        )
        with case(wrong), pytest.raises(InputError, match=message + r".*\n  fix: leave 'bn1\."):
            flatten(OPTIONS, 3, state | {name: wrong})
    for right, batches in ((np.array(7), 7), (np.array(2, np.uint8), 2), (9, 9)):
        assert flatten(OPTIONS, 3, state | {name: right})[3] == batches
    both = {name: np.array(4), "bn2.0.num_batches_tracked": np.array(6)}
    assert flatten(OPTIONS, 3, state | both)[3] == 6
    del state[name]
    assert flatten(OPTIONS, 3, state)[3] == 0


def test_each_error_has_a_fix():
    state = initial_state(OPTIONS, 3)
    lacking = {k: v for k, v in state.items() if k != "conv1.bias"}
    for options, broken, fix in (
        (OPTIONS, lacking, "weights and settings that belong together"),
        (RefineOptions(channels=4, blocks=3), state, "weights and settings that belong together"),
        (OPTIONS, state | {"skip.bias": np.zeros(4)}, "weights and settings that belong together"),
        (OPTIONS, state | {"conv3.bias": np.zeros(4)}, "weights and settings that belong together"),
        (OPTIONS, state | {"conv3.bias": np.full(3, np.nan)}, "before the training diverged"),
    ):
        with pytest.raises(InputError) as caught:
            flatten(options, 3, broken)
        assert fix in caught.value.fix
    with pytest.raises(
        InputError, match="for 3 classes; the guide has class 3\n  fix: use weights"
    ):
        select_classes(OPTIONS, state, np.array([0, 3]))
