// Registering an operator through the stable ABI without losing what torch said.
//
// A call into torch that fails there throws "... API call failed at ..." and leaves torch's own
// message behind (torch 2.13 and later keep it for the calling thread). An operator registered with
// EHRSEQ_BOX adds that message, or, under an older torch, says where to find it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <utility>

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace ehrseq {

// Torch's message for the last failure of this thread; empty where torch does not keep it. Looked
// up by name, as the function is newer than the oldest torch that this library serves.
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

template <auto kOperator>
struct WithTorchMessage;

template <typename Result, typename... Args, Result (*kOperator)(Args...)>
struct WithTorchMessage<kOperator> {
  static Result call(Args... args) {
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

#define EHRSEQ_BOX(function) TORCH_BOX((&::ehrseq::WithTorchMessage<function>::call))
