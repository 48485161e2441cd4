// From the number of an activation to its function of a vector, ValueAndSlope(vf), as a type that a kernel is compiled for.
#pragma once

#include "common/activation_names.h"
#include "common/activations.h"

namespace ck {
namespace CK_ISA {
namespace {

// f(phi) with an activation outside the ReLU family.
template <class F>
void with_smooth(int32_t activation, float slope, const F& f) {
  switch (static_cast<Activation>(activation)) {
    case Activation::gelu: return f([](auto t) __attribute__((always_inline)) { return gelu(t); });
    case Activation::gelu_tanh: return f([](auto t) __attribute__((always_inline)) { return gelu_tanh(t); });
    case Activation::silu: return f([](auto t) __attribute__((always_inline)) { return silu(t); });
    case Activation::elu: return f([slope](auto t) __attribute__((always_inline)) { return elu(t, slope); });
    case Activation::softplus: return f([](auto t) __attribute__((always_inline)) { return softplus(t); });
    case Activation::tanh: return f([](auto t) __attribute__((always_inline)) { return tanh(t); });
    default: return;
  }
}

// f(phi) with any of them.
template <class F>
void with_activation(int32_t activation, float slope, const F& f) {
  const vf zero{}, one = broadcast(1.0f), below = broadcast(slope);
  switch (static_cast<Activation>(activation)) {
    case Activation::relu:
      return f([zero, one](vf t) { return ValueAndSlope{vmax(zero, t), select(t > zero, one, zero)}; });
    case Activation::leaky_relu:
      return f([zero, one, below](vf t) {
        const vi positive = t > zero;
        return ValueAndSlope{select(positive, t, below * t), select(positive, one, below)};
      });
    default: return with_smooth(activation, slope, f);
  }
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
