"""The constants of the algorithm in Python; a test compares them with runtime/csrc/network.h."""

from __future__ import annotations

NORM_EPS = 1e-5  # is added to the variance in a batch norm
RUNNING_SHARE = 0.1  # share of a new picture in the running statistics
MAPPING_STEPS = 10  # the overlap mapping is frozen after these steps
CHECK_EVERY = 10  # steps between two early-stop checks
CHECKS = 3  # this many consecutive checks without a change stop the loop
LOSS_CHANGE = 0.01  # a smaller relative change of the loss is no change
SMALLEST_PRIOR = 1e-4  # smaller probabilities of a prior are raised to this
NEVER = -1e30  # the score of a channel whose class takes no part
LEAST_DEVIATION = 1e-3  # smaller standard deviations of a picture are raised to this
LEAST_AREA = 1e-3  # smaller shares of a class in a picture are raised to this
LEAST_BALANCED = 1e-12  # a smaller sum of balanced shares is raised to this

# Each list holds every pair of neighbours once, as (dy, dx). The spatial loss of dynaguide and
# dynaseg uses the first two of SPATIAL_NEIGHBOURS, or all four with the option ``diagonals``.
# residual uses all of PAIR_NEIGHBOURS, multiplied by each of its distances.
SPATIAL_NEIGHBOURS = ((1, 0), (0, 1), (1, 1), (1, -1))
PAIR_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
