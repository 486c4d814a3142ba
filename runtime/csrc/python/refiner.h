// What the classes Refiner of both modules share: the conversion of options from Python, and of the
// records of steps to arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../network.h"

namespace seg::python {

namespace py = pybind11;

// Returns the options of a dict of Python, in which options of an enumeration are numbers.
inline RefineOptions to_options(const py::dict& d) {
  RefineOptions o;
  o.objective = py::cast<int>(d["objective"]);
  o.classes = py::cast<int>(d["classes"]);
  o.channels = py::cast<int>(d["channels"]);
  o.blocks = py::cast<int>(d["blocks"]);
  o.skip = py::cast<int>(d["skip"]);
  o.final_bn = py::cast<int>(d["final_bn"]);
  o.weighting = py::cast<int>(d["weighting"]);
  o.mapping = py::cast<int>(d["mapping"]);
  o.huber = py::cast<bool>(d["huber"]);
  o.diagonals = py::cast<bool>(d["diagonals"]);
  o.min_labels = py::cast<int>(d["min_labels"]);
  o.early_stop = py::cast<float>(d["early_stop"]);
  o.lr = py::cast<float>(d["lr"]);
  o.momentum = py::cast<float>(d["momentum"]);
  o.mu = py::cast<float>(d["mu"]);
  o.beta = py::cast<float>(d["beta"]);
  o.lambda = py::cast<float>(d["lam"]);
  o.sigma = py::cast<float>(d["sigma"]);
  o.balance = py::cast<float>(d["balance"]);
  o.distances = py::cast<std::vector<int>>(d["offsets"]);
  return o;
}

// Returns losses (steps, 4), with the columns total, first, spatial and guide, and clusters
// (steps,) of the steps that a run has recorded.
inline std::pair<py::array_t<double>, py::array_t<int32_t>> to_arrays(
    const std::vector<StepRecord>& records, const RunResult& result) {
  const int written =
      std::min(result.steps + (result.stop == kDiverged), static_cast<int>(records.size()));
  py::array_t<double> losses({written, 4});
  py::array_t<int32_t> clusters(written);
  for (int i = 0; i < written; ++i) {
    const StepRecord& r = records[i];
    double* row = losses.mutable_data() + 4 * i;
    row[0] = r.total;
    row[1] = r.first;
    row[2] = r.spatial;
    row[3] = r.guide;
    clusters.mutable_data()[i] = r.clusters;
  }
  return {losses, clusters};
}

}  // namespace seg::python
