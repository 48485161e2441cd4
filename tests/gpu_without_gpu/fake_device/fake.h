// What the runtime and the driver of the fake device share: counters, and the names of what was launched.
#pragma once
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))
enum { KERNELS, DRIVER_KERNELS, GEMMS, MEMCPYS, MEMSETS, TENSOR_MAPS, SYNCHRONISATIONS, MALLOCS, COUNTERS };  // __init__.py
extern long fake_counts[COUNTERS];
int fake_devices(void);  // how many: FAKE_DEVICES, or 1
int fake_current(void);  // of this thread
void fake_note(const char* name);  // while fake_logging: one line more of fake_names
void fake_keep(const void* p, size_t size);  // while fake_capturing: more of fake_bytes
