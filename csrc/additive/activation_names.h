// The activations of an additive critic by number, on every device; CODES of primitives/additive/activations.py has
// the same.
#pragma once

#include <cstdint>

namespace ck {

enum class Activation : int32_t { relu, leaky_relu, gelu, gelu_tanh, silu, elu, softplus, tanh };

}  // namespace ck
