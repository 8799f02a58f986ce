// dmoe_ops._C.ExpertPool and Lease: what dmoe_ops/expert_memory.py works with.
#include "bind_expert_pool.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>

#include "cpu/expert_pool.h"

namespace py = pybind11;
using dmoe::cpu::ExpertPool;
using dmoe::cpu::Lease;

namespace {

using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Pieces = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// The pool ends its readers before the memory that they write to may go.
struct Held {
  Held(py::object memory, dmoe::cpu::PoolLayout layout) : memory(std::move(memory)), pool(std::move(layout)) {}
  py::object memory;
  ExpertPool pool;
};

std::vector<int32_t> list_of(const Ids& ids) { return {ids.data(), ids.data() + ids.size()}; }

// memory: what keeps the parts alive. parts: (address, bytes of a slot). pieces: [layers, experts, n, 5], the fields of Piece
// in the order file, part, offset, bytes, at.
std::unique_ptr<Held> make_pool(py::object memory, std::vector<std::string> files,
                                const std::vector<std::pair<uintptr_t, int64_t>>& parts, int64_t slots,
                                const Pieces& pieces, int readers, int64_t ahead_slots, bool direct) {
  if (pieces.ndim() != 4 || pieces.shape(3) != 5)
    throw std::invalid_argument("pieces must have shape [layers, experts, n, 5]");
  dmoe::cpu::PoolLayout layout;
  layout.files = std::move(files);
  for (const auto& [address, stride] : parts) layout.parts.push_back({reinterpret_cast<char*>(address), stride});
  layout.slots = slots, layout.layers = pieces.shape(0), layout.experts = pieces.shape(1);
  const int64_t* from = pieces.data();
  for (int64_t i = 0; i < pieces.size(); i += 5) {
    layout.pieces.push_back(
        {static_cast<int32_t>(from[i]), static_cast<int32_t>(from[i + 1]), from[i + 2], from[i + 3], from[i + 4]});
  }
  layout.readers = readers, layout.ahead_slots = ahead_slots, layout.direct = direct;
  return std::make_unique<Held>(std::move(memory), std::move(layout));
}

void wait(Lease& lease, py::array_t<int32_t, py::array::c_style> map, int64_t experts) {
  if (map.size() != experts) throw std::invalid_argument("the map must have an entry for every expert of a layer");
  int32_t* to = map.mutable_data();
  bool done;
  {
    py::gil_scoped_release released;
    done = lease.wait(to, [] {
      py::gil_scoped_acquire acquired;
      return PyErr_CheckSignals() != 0;
    });
  }
  if (!done) throw py::error_already_set();
}

struct PyLease {
  Lease lease;
  int64_t experts;
};

}  // namespace

namespace dmoe {

void add_expert_pool(py::module_& m) {
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const dmoe::cpu::ReadError& error) {
      py::object args = py::make_tuple(error.code, error.what());
      if (!error.file.empty()) args = py::make_tuple(error.code, error.what(), error.file);
      PyErr_SetObject(PyExc_OSError, args.ptr());
    }
  });
  py::class_<PyLease>(m, "Lease")
      .def(
          "wait",
          [](PyLease& self, py::array_t<int32_t, py::array::c_style> map) { wait(self.lease, map, self.experts); },
          "Fills map int32 [experts] when all experts of the lease are whole. Raises OSError that names file and offset.")
      .def("release", [](PyLease& self) { self.lease.release(); });
  py::class_<Held>(m, "ExpertPool")
      .def(py::init(&make_pool), py::kw_only(), py::arg("memory"), py::arg("files"), py::arg("parts"), py::arg("slots"),
           py::arg("pieces"), py::arg("readers"), py::arg("ahead_slots"), py::arg("direct"))
      .def(
          "request",
          [](Held& self, int64_t layer, const Ids& ids, bool new_visit) {
            auto list = list_of(ids);
            py::gil_scoped_release released;
            return PyLease{self.pool.request(layer, std::move(list), new_visit), self.pool.experts()};
          },
          py::arg("layer"), py::arg("ids"), py::arg("new_visit") = true, py::keep_alive<0, 1>())
      .def("ahead", [](Held& self, int64_t layer, const Ids& ids) { self.pool.ahead(layer, list_of(ids)); })
      .def("last_used", [](const Held& self, int64_t layer) { return self.pool.last_used(layer); })
      .def("resident",
           [](const Held& self, int64_t layer) {
             py::array_t<bool> resident(self.pool.experts());
             self.pool.resident(layer, resident.mutable_data());
             return resident;
           })
      .def("counts",
           [](const Held& self) {
             const auto counts = self.pool.counts();
             py::dict out;
             out["hits"] = counts.hits, out["misses"] = counts.misses, out["bytes_read"] = counts.bytes_read;
             out["stall_ns"] = counts.stall_ns, out["ahead"] = counts.ahead, out["ahead_used"] = counts.ahead_used;
             out["pinned"] = counts.pinned, out["resident"] = counts.resident;
             return out;
           })
      .def("close", [](Held& self) { self.pool.close(); });
}

}  // namespace dmoe
