// What CUDA's own headers need of this one, which comes with the compiler and not with the runtime's wheel.
#pragma once
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDART_DEVICE
#define CUDART_CB
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __no_return__ __attribute__((noreturn))
#define __host__
#define __device__
