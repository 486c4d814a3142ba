// The class Refiner of runtime._cuda.
#pragma once

#include <pybind11/pybind11.h>

namespace seg::python {

// Adds the class to the module.
void bind_refiner(pybind11::module_& m);

}  // namespace seg::python
