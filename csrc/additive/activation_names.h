// The activations of an additive critic by number, on every device; ACTIVATIONS of primitives/additive/moments/reference.py has
// the same order.
#pragma once

#include <cstdint>

namespace ck {

enum class Activation : int32_t { relu, leaky_relu, gelu, gelu_tanh, silu, elu, softplus, tanh };

}  // namespace ck
