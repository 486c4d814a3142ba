// Shared by the files of runtime._core: the types of arrays, and checks of arguments.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "../cpu/kernels.h"

namespace seg::python {

namespace py = pybind11;

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<uint8_t, py::array::c_style | py::array::forcecast>;

// Throws std::invalid_argument unless ok. This check is for errors of the project's own code:
// Python has checked the arguments of users, with better messages.
inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(std::string("runtime._core: ") + what);
}

// Returns the kernels of an instruction set; of the default one if the name is empty. Throws
// std::invalid_argument if this machine cannot run it.
inline const Kernels& kernels(const std::string& isa) {
  if (isa.empty()) return default_kernels();
  const Kernels* found = find_kernels(isa.c_str());
  if (found == nullptr) throw std::invalid_argument("this machine cannot run isa " + isa);
  return *found;
}

// Adds the functions of kernels.cpp to the module.
void bind_kernels(py::module_& m);

}  // namespace seg::python
