"""sanitizers.py on a small kernel: right, without its barrier, past its end, with a barrier in divergent code."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import sanitizers

pytestmark = pytest.mark.skipif(sanitizers.missing() is not None, reason=str(sanitizers.missing()))

SOURCE = """
#include <cuda_bf16.h>
#include <cuda_runtime.h>

int barrier = 1, past = 0;
template <int N>
__global__ void __launch_bounds__(N) total(const __nv_bfloat162* __restrict__ x, float* out, int pairs) {
  extern __shared__ __align__(16) float warps[];
  float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int i = threadIdx.x; i < pairs; i += N) {
    const float2 v = __bfloat1622float2(__hfma2(x[i], __float2bfloat162_rn(2.0f), __float2bfloat162_rn(0.0f)));
    sum.x += v.x, sum.y += v.y;
  }
  float all = sum.x + sum.y;
  for (int o = 16; o; o /= 2) all += __shfl_xor_sync(~0u, all, o);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = all;
  if (barrier == 1) __syncthreads();
  if (barrier == 2) { if (threadIdx.x < 40) __syncthreads(); else __syncwarp(); }
  if (threadIdx.x == 0) out[blockIdx.x] = warps[0] + warps[1 + past] * exp2f(__expf(0.0f) - 1.0f);
}

cudaError_t run(const __nv_bfloat162* x, float* out, int pairs, cudaStream_t stream) {
  if (pairs > 0)
    total<64><<<dim3(2), 64, 2 * sizeof(float), stream>>>(
        x, out, pairs);
  return cudaGetLastError();
}
"""
DRIVER = """
int main(int, char** arguments) {
  barrier = std::atoi(arguments[1]), past = std::atoi(arguments[2]);
  std::vector<__nv_bfloat162> x(100, __float2bfloat162_rn(0.5f));
  std::vector<float> out(2);
  if (run(x.data(), out.data(), 100, nullptr) != cudaSuccess) return 2;
  return out[0] == 200.0f && out[1] == 200.0f ? 0 : 1;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of a sanitizer, built once."""

    @cache
    def build(sanitizer: str) -> Path:
        folder = tmp_path_factory.mktemp(sanitizer)
        (folder / "total.cu").write_text(SOURCE)
        return sanitizers.build(folder, folder / "total.cu", DRIVER, sanitizer)

    return build


def check(program: Path, barrier: int = 1, past: int = 0) -> sanitizers.Report:
    return sanitizers.run(program, str(barrier), str(past))


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_a_right_kernel_is_clean(program, sanitizer):
    report = check(program(sanitizer))
    assert report.clean, report.text


def test_a_dropped_barrier_is_a_race_at_its_line(program):
    report = check(program("thread"), barrier=0)
    assert not report.clean and "data race" in report.text and "total.cu:17" in report.text


def test_an_overrun_is_reported_at_its_line(program):
    report = check(program("address"), past=1)
    assert "heap-buffer-overflow" in report.text and "total.cu:20" in report.text


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_a_barrier_in_divergent_code(program, sanitizer):
    report = check(program(sanitizer), barrier=2)
    assert not report.clean and "deadlock" in report.text
