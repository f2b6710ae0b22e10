// What an autograd node keeps beside tensors.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

namespace ferrotune {

template <typename T>
struct Held : torch::CustomClassHolder {
  explicit Held(T v) : value(std::move(v)) {}
  T value;
};

template <typename T>
c10::IValue hold(T value) {
  return c10::IValue::make_capsule(c10::make_intrusive<Held<T>>(std::move(value)));
}

template <typename T>
T held(const c10::IValue& capsule) {
  return static_cast<Held<T>&>(*capsule.toCapsule()).value;
}

// The value, once.
template <typename T>
T taken(const c10::IValue& capsule) {
  return std::move(static_cast<Held<T>&>(*capsule.toCapsule()).value);
}

}  // namespace ferrotune
