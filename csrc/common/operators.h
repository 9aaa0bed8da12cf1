// Registering an operator through the stable ABI: an error for a missing tensor names the argument,
// and errors keep torch's own message.
//
// For None in place of a required tensor, the dispatcher passes a tensor that is not defined. An
// operator registered with EHRSEQ_BOX refuses it; the names of arguments are in the schemas, which
// are defined in Python and passed to this library when it is loaded.
//
// A call into torch that fails there throws "... API call failed at ..." without torch's own
// message, which torch 2.13 and later keep for the calling thread. An operator registered with
// EHRSEQ_BOX adds that message, or, with an older torch, says where to find it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <utility>

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace ehrseq {

// Torch's message for the last failure of this thread; empty where torch does not keep it. Looked
// up by name, as the function is newer than the oldest torch that this library supports.
inline std::string last_message_of_torch() {
#if defined(__linux__) || defined(__APPLE__)
  using GetMessage = const char* (*)();
  static const auto get_message = reinterpret_cast<GetMessage>(
      dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* message = get_message == nullptr ? nullptr : get_message();
  return message == nullptr ? "" : message;
#else
  return "";
#endif
}

// The schemas of all operators, one per line.
inline std::string& known_schemas() {
  static std::string schemas;
  return schemas;
}

// Argument number `at` of an operator, counted from 0, as the schemas call it.
inline std::string argument_name(const std::string& operation, int at) {
  const std::string& schemas = known_schemas();
  size_t begin = ("\n" + schemas).find("\n" + operation + "(");
  if (begin == std::string::npos) return "argument " + std::to_string(at + 1);
  begin += operation.size() + 1;
  for (; at > 0; --at) begin = schemas.find(',', begin) + 1;
  const size_t end = schemas.find_first_of(",)", begin);
  const std::string argument = schemas.substr(begin, end - begin);  // "Tensor codes"
  return argument.substr(argument.rfind(' ') + 1);
}

[[noreturn]] inline void refuse_missing(const char* function, int at) {
  const std::string path = function;  // "&ehrseq::visit_pool"
  const std::string operation = path.substr(path.rfind(':') + 1);
  throw std::invalid_argument(operation + ": " + argument_name(operation, at) +
                              ": expected a tensor, got None");
}

template <typename Argument>
bool is_missing(const Argument&) {
  return false;
}
inline bool is_missing(const torch::stable::Tensor& tensor) { return !tensor.defined(); }

template <auto kOperator>
struct WithTorchMessage;

template <typename Result, typename... Args, Result (*kOperator)(Args...)>
struct WithTorchMessage<kOperator> {
  inline static const char* function = "";

  static Result call(Args... args) {
    int at = 0;
    if (((is_missing(args) || (++at, false)) || ...)) refuse_missing(function, at);
    try {
      return kOperator(std::forward<Args>(args)...);
    } catch (const std::runtime_error& error) {
      const std::string text = error.what();
      if (text.find("API call failed") == std::string::npos) throw;
      const std::string message = last_message_of_torch();
      throw std::runtime_error(
          message.empty()
              ? "torch refused a call or ran out of memory; its own message is on stderr (" + text +
                    ")"
              : message + " (" + text + ")");
    }
  }
};

}  // namespace ehrseq

// Called for every operator when the library is loaded, or the operator is defined later.
extern "C" inline __attribute__((used, visibility("default"))) void ehrseq_fast_add_schema(
    const char* schema) {
  ehrseq::known_schemas() += std::string(schema) + "\n";
}

#define EHRSEQ_BOX(operation)                                    \
  (::ehrseq::WithTorchMessage<operation>::function = #operation, \
   TORCH_BOX((&::ehrseq::WithTorchMessage<operation>::call)))
