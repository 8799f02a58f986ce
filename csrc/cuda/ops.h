// What ops.cpp adds to the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace dmoe::cuda {

void add_rules(pybind11::module_& m);

}  // namespace dmoe::cuda
