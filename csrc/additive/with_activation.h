// From the number of an activation to its function of a vector, ValueAndSlope(vf), as a type that a kernel is compiled for.
#pragma once

#include "additive/activation_names.h"
#include "additive/activations.h"

namespace ck {
namespace CK_ISA {
namespace {

// Types with names: bench/critic_code.py finds their kernels by them.
#define CK_ACTIVATION(Name, expression)                   \
  struct Name {                                           \
    float slope;                                          \
    template <class V>                                    \
    CK_INLINE_MEMBER Activated<V> operator()(V t) const { \
      return expression;                                  \
    }                                                     \
  };
CK_ACTIVATION(Gelu, gelu(t))
CK_ACTIVATION(GeluTanh, gelu_tanh(t))
CK_ACTIVATION(Silu, silu(t))
CK_ACTIVATION(Elu, elu(t, slope))
CK_ACTIVATION(Softplus, softplus(t))
CK_ACTIVATION(Tanh, tanh(t))
#undef CK_ACTIVATION

// f(phi) with an activation outside the ReLU family.
template <class F>
void with_smooth(int32_t activation, float slope, const F& f) {
  switch (static_cast<Activation>(activation)) {
    case Activation::gelu:
      return f(Gelu{slope});
    case Activation::gelu_tanh:
      return f(GeluTanh{slope});
    case Activation::silu:
      return f(Silu{slope});
    case Activation::elu:
      return f(Elu{slope});
    case Activation::softplus:
      return f(Softplus{slope});
    case Activation::tanh:
      return f(Tanh{slope});
    default:
      return;
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
    default:
      return with_smooth(activation, slope, f);
  }
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
