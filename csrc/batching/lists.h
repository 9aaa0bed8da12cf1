// Walks patients -> visits -> code ids, with the GIL held, into flat arrays that need it no more.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "batching/errors.h"

namespace ehrseq::batching {

namespace py = pybind11;

struct FlatLists {
  std::vector<int64_t> codes;
  std::vector<int64_t> visit_offsets{0};
  std::vector<int64_t> patient_offsets{0};
};

inline std::string type_name(PyObject* object) {
  return py::str(py::type::of(object).attr("__name__"));
}

// A list or tuple is walked in place; any other iterable is listed first. `where` names the place
// for an error message, and is only asked when there is one.
class Items {
 public:
  template <typename Where>
  Items(PyObject* iterable, const char* expected, const Where& where)
      : fast_(py::reinterpret_steal<py::object>(PySequence_Fast(iterable, ""))) {
    if (fast_) return;
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    throw py::type_error(where() + ": expected " + expected + ", got " + type_name(iterable) + ".");
  }
  Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(fast_.ptr()); }
  PyObject* operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(fast_.ptr(), i); }

 private:
  py::object fast_;
};

// What does not fit 64 bits is outside every vocabulary: it becomes a code that is refused as such.
inline int64_t read_integer(PyObject* integer) {
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(integer, &overflow);
  if (value == -1 && overflow == 0 && PyErr_Occurred()) throw py::error_already_set();
  return overflow ? -1 : value;
}

inline int64_t read_code(PyObject* object, int64_t patient, int64_t visit, int64_t code) {
  if (PyLong_Check(object)) return read_integer(object);
  const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(object));
  if (integer) return read_integer(integer.ptr());
  PyErr_Clear();
  throw py::type_error("patient " + text(patient) + ", visit " + text(visit) + ", code " +
                       text(code) + ": expected an integer code, got " + type_name(object) + ".");
}

inline FlatLists flatten(const py::object& patients) {
  FlatLists flat;
  const Items people(patients.ptr(), "a sequence of patients",
                     [] { return std::string("patients"); });
  for (Py_ssize_t p = 0; p < people.size(); ++p) {
    const Items visits(people[p], "a sequence of visits", [&] { return "patient " + text(p); });
    for (Py_ssize_t v = 0; v < visits.size(); ++v) {
      const Items codes(visits[v], "a sequence of codes",
                        [&] { return "patient " + text(p) + ", visit " + text(v); });
      for (Py_ssize_t c = 0; c < codes.size(); ++c)
        flat.codes.push_back(read_code(codes[c], p, v, c));
      flat.visit_offsets.push_back(static_cast<int64_t>(flat.codes.size()));
    }
    flat.patient_offsets.push_back(static_cast<int64_t>(flat.visit_offsets.size()) - 1);
  }
  return flat;
}

}  // namespace ehrseq::batching
