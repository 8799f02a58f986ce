#pragma once

#include <pybind11/pybind11.h>

namespace dmoe {

void add_expert_pool(pybind11::module_& m);

}  // namespace dmoe
