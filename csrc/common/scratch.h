// Scratch memory that outlives a call: a kernel gives back what the next one takes, so a training step does not have the
// system clear the same pages again (up to 9 % of a clip_loss).
#pragma once

#include <cstdint>

namespace ck {

// At least `size` bytes at a multiple of 64, of a huge page where there is room for one; null when there is no memory.
void* scratch_take(int64_t size);
void scratch_give(void* data);  // what scratch_take returned, or null
void scratch_free(void* data);  // the same for what the rest of this call should not have to count in its peak

// The bytes kept for later, and the most that are: what is given back beyond that is freed.
int64_t scratch_kept();
int64_t scratch_limit();
void set_scratch_limit(int64_t size);

}  // namespace ck
