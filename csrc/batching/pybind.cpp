// The module ehrseq_fast._batching: NumPy arrays in, NumPy arrays out, the GIL released in between.
// Everything that is indexed by is checked here, values as well as shapes and dtypes, whoever
// calls; ehrseq_fast/batch/ has refused most of it already, in terms of what the user passed.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "batching/lists.h"
#include "batching/mapped.h"
#include "batching/pack.h"

namespace ehrseq::batching {
namespace {

using Longs = py::array_t<int64_t, py::array::c_style>;
using OptionalLongs = std::optional<Longs>;
using Ints = py::array_t<int32_t, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using OptionalBytes = std::optional<Bytes>;

std::string shape_of(const py::array& array) {
  std::string shape = "[";
  for (py::ssize_t d = 0; d < array.ndim(); ++d) shape += (d ? ", " : "") + text(array.shape(d));
  return shape + "]";
}

void expect_dimensions(const char* name, const py::array& array, py::ssize_t ndim) {
  if (array.ndim() != ndim)
    refuse_value(std::string(name) + ": expected " + text(ndim) +
                 (ndim == 1 ? " dimension" : " dimensions") + ", got shape " + shape_of(array));
}

void expect_integers(const char* name, const py::array& array, py::ssize_t ndim) {
  expect_dimensions(name, array, ndim);
  if (!array.dtype().equal(py::dtype::of<int32_t>()) &&
      !array.dtype().equal(py::dtype::of<int64_t>()))
    throw py::type_error(std::string(name) + ": expected int32 or int64, got " +
                         std::string(py::str(array.dtype())));
}

// None for what is no integer of the machine's byte order.
std::optional<IntKind> kind_of(const py::dtype& dtype) {
  if (dtype.equal(py::dtype::of<int64_t>())) return IntKind::kInt64;
  if (dtype.equal(py::dtype::of<int32_t>())) return IntKind::kInt32;
  if (dtype.equal(py::dtype::of<int16_t>())) return IntKind::kInt16;
  if (dtype.equal(py::dtype::of<int8_t>())) return IntKind::kInt8;
  if (dtype.equal(py::dtype::of<uint64_t>())) return IntKind::kUint64;
  if (dtype.equal(py::dtype::of<uint32_t>())) return IntKind::kUint32;
  if (dtype.equal(py::dtype::of<uint16_t>())) return IntKind::kUint16;
  if (dtype.equal(py::dtype::of<uint8_t>())) return IntKind::kUint8;
  return std::nullopt;
}

void expect_codes(const py::array& codes) {
  expect_dimensions("codes", codes, 1);
  if (!kind_of(codes.dtype()))
    throw py::type_error("codes: expected integers, got " + std::string(py::str(codes.dtype())));
}

void expect_offset(const char* name, const py::array& array) {
  expect_integers(name, array, 1);
  if (array.size() == 0)
    refuse_value(std::string(name) + ": expected at least one offset (a 0), got an empty array");
}

template <typename Array>
void expect_shape(const char* name, const std::optional<Array>& array,
                  const std::vector<py::ssize_t>& shape) {
  if (!array) return;
  if (std::vector<py::ssize_t>(array->shape(), array->shape() + array->ndim()) == shape) return;
  std::string expected = "[";
  for (size_t d = 0; d < shape.size(); ++d) expected += (d ? ", " : "") + text(shape[d]);
  refuse_value(std::string(name) + ": expected shape " + expected + "], got " + shape_of(*array));
}

Vocabulary vocabulary_of(int64_t size) {
  if (size < 1 || size > kMostEntries + 1)
    refuse_value("vocab_size: expected 1 to " + text(kMostEntries + 1) + ", got " + text(size));
  return {size};
}

IntColumn column(const py::array& array) {
  return {static_cast<const char*>(array.data()), array.strides(0), array.size(),
          array.itemsize() == sizeof(int64_t)};
}

CodeColumn codes_of(const py::array& array) { return {column(array), *kind_of(array.dtype())}; }

IntColumn column(const std::vector<int64_t>& values) {
  return {reinterpret_cast<const char*>(values.data()), sizeof(int64_t),
          static_cast<int64_t>(values.size()), true};
}

template <typename Array>
auto data_or_null(const std::optional<Array>& array) -> decltype(array->data()) {
  return array ? array->data() : nullptr;
}

OutcomeArrays outcomes_of(const OptionalLongs& times, const OptionalLongs& indicators,
                          const OptionalLongs& types, int64_t n_patients) {
  expect_shape("event_times", times, {n_patients});
  expect_shape("event_indicators", indicators, {n_patients});
  expect_shape("event_types", types, {n_patients});
  return {data_or_null(times), data_or_null(indicators), data_or_null(types)};
}

// Hands the memory over to NumPy.
py::object as_array(Buffer buffer, int64_t longs) {
  if (!buffer) return py::none();
  int64_t* const memory = buffer.get();
  const py::capsule owner(buffer.release(), [](void* owned) { std::free(owned); });
  return py::array_t<int64_t>(longs, memory, owner);
}

py::tuple as_tuple(Packed packed) {
  const Sizes& sizes = packed.sizes;
  return py::make_tuple(py::make_tuple(sizes.patients, sizes.max_visits, sizes.visits, sizes.codes,
                                       sizes.distinct_codes),
                        as_array(std::move(packed.host), packed.host_longs),
                        as_array(std::move(packed.fields), packed.field_longs),
                        as_array(std::move(packed.source_rows), sizes.visits));
}

py::tuple pack_flat(const py::array& codes, const py::array& visit_offsets,
                    const py::array& patient_offsets, const OptionalLongs& patients,
                    int64_t vocab_size, const OptionalLongs& event_times,
                    const OptionalLongs& event_indicators, const OptionalLongs& event_types,
                    bool with_source_rows) {
  expect_codes(codes);
  expect_offset("visit_offsets", visit_offsets);
  expect_offset("patient_offsets", patient_offsets);
  if (patients) expect_shape("patients", patients, {patients->size()});
  const Vocabulary vocabulary = vocabulary_of(vocab_size);
  const CodeColumn flat_codes = codes_of(codes);
  const IntColumn visits = column(visit_offsets);
  const IntColumn patient_column = column(patient_offsets);
  const int64_t* const chosen = data_or_null(patients);
  const int64_t n_chosen = patients ? patients->size() : 0;
  const OutcomeArrays outcomes = outcomes_of(event_times, event_indicators, event_types,
                                             patients ? n_chosen : patient_column.size - 1);
  Packed packed;
  {
    const py::gil_scoped_release released;
    const FlatRecords records(flat_codes, visits, patient_column, chosen, n_chosen);
    packed = pack(records, vocabulary, outcomes, with_source_rows);
  }
  return as_tuple(std::move(packed));
}

py::tuple pack_mapped(const py::array& codes, const py::array& visit_offsets,
                      const py::array& patient_offsets, const Longs& patients,
                      const Longs& n_visits, const Ints& code_map, int64_t vocab_size,
                      const OptionalLongs& event_times, const OptionalLongs& event_indicators,
                      const OptionalLongs& event_types, bool with_source_rows) {
  expect_integers("codes", codes, 1);
  expect_offset("visit_offsets", visit_offsets);
  expect_offset("patient_offsets", patient_offsets);
  const int64_t n_chosen = patients.size();
  expect_shape<Longs>("patients", patients, {n_chosen});
  expect_shape<Longs>("n_visits", n_visits, {n_chosen});
  expect_shape<Ints>("code_map", code_map, {code_map.size()});
  const Vocabulary vocabulary = vocabulary_of(vocab_size);
  const CodeColumn flat_codes = codes_of(codes);
  const IntColumn visits = column(visit_offsets);
  const IntColumn patient_column = column(patient_offsets);
  const int64_t* const chosen = patients.data();
  const int64_t* const first_visits = n_visits.data();
  const CodeMap map{code_map.data(), code_map.size()};
  const OutcomeArrays outcomes = outcomes_of(event_times, event_indicators, event_types, n_chosen);
  Packed packed;
  {
    const py::gil_scoped_release released;
    const MappedRecords records(
        FlatRecords(flat_codes, visits, patient_column, chosen, n_chosen, {}, first_visits), map);
    packed = pack(records, vocabulary, outcomes, with_source_rows);
  }
  return as_tuple(std::move(packed));
}

py::tuple pack_lists(const py::object& patients, int64_t vocab_size,
                     const OptionalLongs& event_times, const OptionalLongs& event_indicators,
                     const OptionalLongs& event_types, bool with_source_rows) {
  const Vocabulary vocabulary = vocabulary_of(vocab_size);
  const FlatLists flat = flatten(patients);
  const OutcomeArrays outcomes = outcomes_of(event_times, event_indicators, event_types,
                                             static_cast<int64_t>(flat.patient_offsets.size()) - 1);
  Packed packed;
  {
    const py::gil_scoped_release released;
    const FlatRecords records({column(flat.codes)}, column(flat.visit_offsets),
                              column(flat.patient_offsets), nullptr, 0, flat.huge);
    packed = pack(records, vocabulary, outcomes, with_source_rows);
  }
  return as_tuple(std::move(packed));
}

template <typename code_t>
Packed pack_padded_as(const void* codes, PaddedShape shape, const uint8_t* code_states,
                      const uint8_t* visit_states, const int64_t* lengths,
                      const Vocabulary& vocabulary, const OutcomeArrays& outcomes) {
  const PaddedRecords<code_t> records(static_cast<const code_t*>(codes), shape, code_states,
                                      visit_states, lengths);
  return pack(records, vocabulary, outcomes, false);
}

py::tuple pack_padded(const py::array& codes, const OptionalBytes& code_states,
                      const OptionalBytes& visit_states, const OptionalLongs& lengths,
                      int64_t vocab_size, const OptionalLongs& event_times,
                      const OptionalLongs& event_indicators, const OptionalLongs& event_types) {
  expect_integers("codes", codes, 3);
  constexpr int kAligned = py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if (!(codes.flags() & py::array::c_style) || !(codes.flags() & kAligned))
    refuse_value("codes: expected a contiguous array");
  expect_shape("code_states", code_states, {codes.shape(0), codes.shape(1), codes.shape(2)});
  expect_shape("visit_states", visit_states, {codes.shape(0), codes.shape(1)});
  expect_shape("lengths", lengths, {codes.shape(0)});
  const Vocabulary vocabulary = vocabulary_of(vocab_size);
  const PaddedShape shape{codes.shape(0), codes.shape(1), codes.shape(2)};
  const auto pack_as =
      codes.itemsize() == sizeof(int64_t) ? pack_padded_as<int64_t> : pack_padded_as<int32_t>;
  const void* const slots = codes.data();
  const uint8_t* const code_mask = data_or_null(code_states);
  const uint8_t* const visit_mask = data_or_null(visit_states);
  const int64_t* const known_lengths = data_or_null(lengths);
  const OutcomeArrays outcomes =
      outcomes_of(event_times, event_indicators, event_types, shape.patients);
  Packed packed;
  {
    const py::gil_scoped_release released;
    packed = pack_as(slots, shape, code_mask, visit_mask, known_lengths, vocabulary, outcomes);
  }
  return as_tuple(std::move(packed));
}

}  // namespace
}  // namespace ehrseq::batching

PYBIND11_MODULE(_batching, module) {
  using namespace ehrseq::batching;
  using py::arg;
  module.doc() = "Packs ragged records into one batch; see ehrseq_fast.PackedVisits.";
  module.def("pack_flat", &pack_flat, arg("codes").noconvert(), arg("visit_offsets").noconvert(),
             arg("patient_offsets").noconvert(), arg("patients").noconvert(), arg("vocab_size"),
             arg("event_times").noconvert(), arg("event_indicators").noconvert(),
             arg("event_types").noconvert(), arg("with_source_rows"));
  module.def("pack_mapped", &pack_mapped, arg("codes").noconvert(),
             arg("visit_offsets").noconvert(), arg("patient_offsets").noconvert(),
             arg("patients").noconvert(), arg("n_visits").noconvert(), arg("code_map").noconvert(),
             arg("vocab_size"), arg("event_times").noconvert(), arg("event_indicators").noconvert(),
             arg("event_types").noconvert(), arg("with_source_rows"));
  module.def("pack_lists", &pack_lists, arg("patients"), arg("vocab_size"),
             arg("event_times").noconvert(), arg("event_indicators").noconvert(),
             arg("event_types").noconvert(), arg("with_source_rows"));
  module.def("pack_padded", &pack_padded, arg("codes").noconvert(), arg("code_states").noconvert(),
             arg("visit_states").noconvert(), arg("lengths").noconvert(), arg("vocab_size"),
             arg("event_times").noconvert(), arg("event_indicators").noconvert(),
             arg("event_types").noconvert());
}
