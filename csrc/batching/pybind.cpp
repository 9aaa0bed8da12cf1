// The module ehrseq_fast._batching: NumPy arrays in, NumPy arrays out, the GIL released in between.
// Shapes and dtypes were checked by ehrseq_fast/batch/; values are checked here.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "batching/lists.h"
#include "batching/pack.h"

namespace ehrseq::batching {
namespace {

using Longs = py::array_t<int64_t, py::array::c_style>;
using OptionalLongs = std::optional<Longs>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using OptionalBytes = std::optional<Bytes>;

IntColumn column(const py::array& array) {
  return {static_cast<const char*>(array.data()), array.ndim() == 1 ? array.strides(0) : 0,
          array.size(), array.itemsize() == sizeof(int64_t)};
}

IntColumn column(const std::vector<int64_t>& values) {
  return {reinterpret_cast<const char*>(values.data()), sizeof(int64_t),
          static_cast<int64_t>(values.size()), true};
}

template <typename Array>
auto data_or_null(const std::optional<Array>& array) -> decltype(array->data()) {
  return array ? array->data() : nullptr;
}

Outcomes outcomes_of(const OptionalLongs& times, const OptionalLongs& indicators,
                     const OptionalLongs& types, int64_t n_patients) {
  for (const auto* outcome : {&times, &indicators, &types})
    if (*outcome && (*outcome)->size() != n_patients)
      refuse_value("Expected one outcome for each of " + text(n_patients) + " patients, got " +
                   text((*outcome)->size()) + ".");
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
  const IntColumn flat_codes = column(codes);
  const IntColumn visits = column(visit_offsets);
  const IntColumn people = column(patient_offsets);
  const int64_t* const chosen = data_or_null(patients);
  const int64_t n_chosen = patients ? patients->size() : 0;
  const Outcomes outcomes = outcomes_of(event_times, event_indicators, event_types,
                                        patients ? n_chosen : people.size - 1);
  Packed packed;
  {
    const py::gil_scoped_release released;
    const FlatRecords records(flat_codes, visits, people, chosen, n_chosen);
    packed = pack(records, Vocabulary{vocab_size}, outcomes, with_source_rows);
  }
  return as_tuple(std::move(packed));
}

py::tuple pack_lists(const py::object& patients, int64_t vocab_size,
                     const OptionalLongs& event_times, const OptionalLongs& event_indicators,
                     const OptionalLongs& event_types, bool with_source_rows) {
  const FlatLists flat = flatten(patients);
  const Outcomes outcomes = outcomes_of(event_times, event_indicators, event_types,
                                        static_cast<int64_t>(flat.patient_offsets.size()) - 1);
  Packed packed;
  {
    const py::gil_scoped_release released;
    const FlatRecords records(column(flat.codes), column(flat.visit_offsets),
                              column(flat.patient_offsets), nullptr, 0);
    packed = pack(records, Vocabulary{vocab_size}, outcomes, with_source_rows);
  }
  return as_tuple(std::move(packed));
}

template <typename code_t>
Packed pack_padded_as(const void* codes, PaddedShape shape, const uint8_t* code_states,
                      const uint8_t* visit_states, const int64_t* lengths, int64_t vocab_size,
                      const Outcomes& outcomes) {
  const PaddedRecords<code_t> records(static_cast<const code_t*>(codes), shape, code_states,
                                      visit_states, lengths);
  return pack(records, Vocabulary{vocab_size}, outcomes, false);
}

py::tuple pack_padded(const py::array& codes, const OptionalBytes& code_states,
                      const OptionalBytes& visit_states, const OptionalLongs& lengths,
                      int64_t vocab_size, const OptionalLongs& event_times,
                      const OptionalLongs& event_indicators, const OptionalLongs& event_types) {
  const PaddedShape shape{codes.shape(0), codes.shape(1), codes.shape(2)};
  const auto pack_as =
      codes.itemsize() == sizeof(int64_t) ? pack_padded_as<int64_t> : pack_padded_as<int32_t>;
  const void* const slots = codes.data();
  const uint8_t* const code_mask = data_or_null(code_states);
  const uint8_t* const visit_mask = data_or_null(visit_states);
  const int64_t* const known_lengths = data_or_null(lengths);
  const Outcomes outcomes = outcomes_of(event_times, event_indicators, event_types, shape.patients);
  Packed packed;
  {
    const py::gil_scoped_release released;
    packed = pack_as(slots, shape, code_mask, visit_mask, known_lengths, vocab_size, outcomes);
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
  module.def("pack_lists", &pack_lists, arg("patients"), arg("vocab_size"),
             arg("event_times").noconvert(), arg("event_indicators").noconvert(),
             arg("event_types").noconvert(), arg("with_source_rows"));
  module.def("pack_padded", &pack_padded, arg("codes").noconvert(), arg("code_states").noconvert(),
             arg("visit_states").noconvert(), arg("lengths").noconvert(), arg("vocab_size"),
             arg("event_times").noconvert(), arg("event_indicators").noconvert(),
             arg("event_types").noconvert());
}
