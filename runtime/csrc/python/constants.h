// The constants of network.h for Python. A test compares them with Python's constants.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "../network.h"

namespace seg::python {

namespace py = pybind11;

// Returns the names of the options of an enumeration, in the order of their numbers. count is the
// number of options in network.h.
template <class... Names>
py::tuple options(int count, const Names&... names) {
  if (count != static_cast<int>(sizeof...(names)))
    throw std::logic_error("python/constants.h lacks the name of an option of network.h");
  return py::make_tuple(names...);
}

// Returns the offsets as tuples (dy, dx).
inline py::tuple pairs(const Offset (&offsets)[4]) {
  py::tuple out(4);
  for (int i = 0; i < 4; ++i) out[i] = py::make_tuple(offsets[i].dy, offsets[i].dx);
  return out;
}

// Returns all constants by name.
inline py::dict constants() {
  py::dict d;
  d["norm_eps"] = kNormEps;
  d["running_share"] = kRunningShare;
  d["momentum"] = RefineOptions{}.momentum;
  d["mapping_steps"] = kMappingSteps;
  d["check_every"] = kCheckEvery;
  d["checks"] = kChecks;
  d["loss_change"] = kLossChange;
  d["smallest_prior"] = kSmallestPrior;
  d["never"] = kNever;
  d["least_deviation"] = kLeastDeviation;
  d["least_area"] = kLeastArea;
  d["least_balanced"] = kLeastBalanced;
  d["spatial_neighbours"] = pairs(kSpatialNeighbours);
  d["pair_neighbours"] = pairs(kPairNeighbours);
  d["objective"] = options(kObjectives, "residual", "cluster");
  d["skip"] = options(kSkips, "none", "shared", "own");
  d["weighting"] = options(kWeightings, "fixed", "fsf", "scf");
  d["mapping"] = options(kMappings, "overlap", "index_modulo");
  d["final_bn"] = options(kFinalNorms, "none", "image", "running");
  d["stop"] =
      options(kStops, "steps", "min_labels", "silhouette", "converged", "diverged", "budget");
  return d;
}

}  // namespace seg::python
