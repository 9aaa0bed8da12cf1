// Reads patients -> visits -> code ids, with the GIL held, into flat arrays that do not need it.
//
// Iterating over what is no list, and reading what is no int, runs the caller's Python, which may
// empty the very lists that are read. So lists are copied before anything of that kind runs, and
// whatever it raises is passed on, except the TypeError of what is no sequence or no integer.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "batching/records.h"

namespace ehrseq::batching {

namespace py = pybind11;

struct FlatLists {
  std::vector<int64_t> codes;
  std::vector<int64_t> visit_offsets{0};
  std::vector<int64_t> patient_offsets{0};
  HugeCode huge;
};

// The type's __name__, read without running Python, as an error may be set.
inline std::string type_name(PyObject* object) {
  const std::string name = Py_TYPE(object)->tp_name;
  return name.substr(name.rfind('.') + 1);
}

// Raises a TypeError in place of the one that is set, which becomes its cause.
[[noreturn]] inline void refuse_type(const std::string& message) {
  if (PyErr_Occurred()) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    py::raise_from(PyExc_TypeError, message.c_str());
    throw py::error_already_set();
  }
  throw py::type_error(message);
}

// `where` names the place for an error message, and is called only for one.
template <typename Where>
py::tuple snapshot(PyObject* iterable, const char* expected, const Where& where) {
  // text and mappings can be iterated over, but hold no codes in an order
  const bool misleading = PyUnicode_Check(iterable) || PyBytes_Check(iterable) ||
                          PyByteArray_Check(iterable) || PyDict_Check(iterable);
  if (!misleading) {
    auto items = py::reinterpret_steal<py::object>(PySequence_Tuple(iterable));
    if (items) return py::reinterpret_steal<py::tuple>(items.release());
  }
  refuse_type(where() + ": expected " + expected + ", got " + type_name(iterable) + ".");
}

class CodeReader {
 public:
  explicit CodeReader(FlatLists& flat) : flat_(flat) {}

  void read_visit(PyObject* items, int64_t patient, int64_t visit) {
    patient_ = patient;
    visit_ = visit;
    if (!PyList_CheckExact(items) || !read_plain(items)) {
      const py::tuple all = snapshot(items, "a sequence of codes", [&] {
        return "patient " + text(patient_) + ", visit " + text(visit_);
      });
      for (Py_ssize_t c = 0; c < PyTuple_GET_SIZE(all.ptr()); ++c)
        flat_.codes.push_back(read(PyTuple_GET_ITEM(all.ptr(), c), c));
    }
    flat_.visit_offsets.push_back(static_cast<int64_t>(flat_.codes.size()));
  }

 private:
  // A list of nothing but ints, which runs no Python; false, and nothing read, where it is not.
  bool read_plain(PyObject* list) {
    const size_t before = flat_.codes.size();
    for (Py_ssize_t c = 0; c < PyList_GET_SIZE(list); ++c) {
      PyObject* const item = PyList_GET_ITEM(list, c);
      if (!PyLong_CheckExact(item)) {
        flat_.codes.resize(before);
        if (flat_.huge.at >= static_cast<int64_t>(before)) flat_.huge = {};
        return false;
      }
      flat_.codes.push_back(read_integer(item));
    }
    return true;
  }

  int64_t read(PyObject* object, int64_t code) {
    if (PyLong_CheckExact(object)) return read_integer(object);
    if (PyBool_Check(object)) refuse(object, code);
    if (PyLong_Check(object)) return read_integer(object);
    auto value = py::reinterpret_borrow<py::object>(object);
    const auto ndim = py::reinterpret_steal<py::object>(PyObject_GetAttrString(object, "ndim"));
    if (ndim) {
      value = item_of(object, ndim, code);
    } else if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
      PyErr_Clear();
    } else {
      throw py::error_already_set();
    }
    const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!integer || PyBool_Check(value.ptr())) refuse(object, code);
    return read_integer(integer.ptr());
  }

  // Of a NumPy scalar or a tensor: a boolean one would be an index too, and so would a tensor of
  // one element in several dimensions.
  py::object item_of(PyObject* object, const py::object& ndim, int64_t code) {
    if (!ndim.equal(py::int_(0))) refuse(object, code);
    return py::handle(object).attr("item")();
  }

  // What does not fit 64 bits is outside every vocabulary: it becomes a code that is refused as
  // such, and the first of them is remembered for the message.
  int64_t read_integer(PyObject* integer) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(integer, &overflow);
    if (value == -1) refuse_or_remember(integer, overflow);
    return value;
  }

  void refuse_or_remember(PyObject* integer, int overflow) {
    if (overflow == 0 && PyErr_Occurred()) throw py::error_already_set();
    if (overflow != 0 && flat_.huge.at < 0)
      flat_.huge = {static_cast<int64_t>(flat_.codes.size()), as_text(integer)};
  }

  static std::string as_text(PyObject* integer) {
    const py::object bits = py::handle(integer).attr("bit_length")();
    if (bits.cast<int64_t>() > 256) return "an integer of " + text(bits.cast<int64_t>()) + " bits";
    return py::str(py::handle(integer));
  }

  [[noreturn]] void refuse(PyObject* object, int64_t code) const {
    refuse_type("patient " + text(patient_) + ", visit " + text(visit_) + ", code " + text(code) +
                ": expected an integer code, got " + type_name(object) + ".");
  }

  FlatLists& flat_;
  int64_t patient_ = 0;
  int64_t visit_ = 0;
};

inline FlatLists flatten(const py::object& patients) {
  FlatLists flat;
  CodeReader reader(flat);
  const py::tuple patient_items =
      snapshot(patients.ptr(), "a sequence of patients", [] { return std::string("patients"); });
  for (Py_ssize_t p = 0; p < PyTuple_GET_SIZE(patient_items.ptr()); ++p) {
    const py::tuple visits = snapshot(PyTuple_GET_ITEM(patient_items.ptr(), p),
                                      "a sequence of visits", [&] { return "patient " + text(p); });
    for (Py_ssize_t v = 0; v < PyTuple_GET_SIZE(visits.ptr()); ++v)
      reader.read_visit(PyTuple_GET_ITEM(visits.ptr(), v), p, v);
    flat.patient_offsets.push_back(static_cast<int64_t>(flat.visit_offsets.size()) - 1);
  }
  return flat;
}

}  // namespace ehrseq::batching
