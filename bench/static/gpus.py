"""Public constants of the GPUs that predictions are made for, and how many blocks of a kernel one processor holds.

Sources, by column:
  arithmetic   lanes per clock and processor: CUDA C++ Best Practices Guide 13, "Throughput of native arithmetic
               instructions" (before CUDA 13 in the Programming Guide), columns 8.0, 9.0, 10.0, 12.0: 16 of exp2 and 32
               of shuffle in all; float32 min/max is 128 in 10.0 alone, integer addition 128 in 12.0 alone, else 64
  limits       warps, blocks, shared memory: CUDA Programming Guide, "Compute capabilities", and cuda::arch_traits of
               CCCL, which has the same numbers; shared_block is shared less the kilobyte that the system reserves
  A100         A100 whitepaper: 108 processors, 1.41 GHz, 312 TFLOP/s; A100 80GB data sheet: 2039 GB/s
  H100         H100 whitepaper: 132 processors, 989.4 TFLOP/s at the 1.83 GHz that it gives for tensor work; data sheet:
               3.35 TB/s (5120 bits of HBM3 at 5.24 Gbit/s are 3.352)
  B200         Blackwell technical brief, HGX B200: 2.25 PFLOP/s, at most 8 TB/s (boards are also listed with 7.7); 148
               processors and boost 1.965 GHz in public device lists, the clock here follows from the peak
  RTX 5090     RTX Blackwell whitepaper: 170 processors, 2.407 GHz, 209.5 TFLOP/s with float32 accumulators, 1792 GB/s
Tensor peaks are dense.  The clock is the one at which processors x tensor flop per clock is the published peak.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU; rates are per clock and streaming multiprocessor."""

    name: str
    capability: int  # 10 * major + minor
    processors: int
    ghz: float
    bandwidth: float  # bytes/s of device memory
    tensor: int  # dense bfloat16 flop with float32 accumulators
    fma: int  # lanes of float32 add, multiply, multiply-add
    mufu: int = 16  # lanes of exp2, log2, reciprocal, square root
    alu: int = 64  # lanes of compare, select, shift, logic, convert
    add: int = 64  # lanes of integer addition, of the same pipe
    minmax: int = 64  # lanes of float32 minimum and maximum, of the same pipe
    shuffle: int = 32  # lanes of warp shuffle
    shared_rate: int = 128  # bytes of shared memory
    issue: int = 4  # warp instructions
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    shared: int = 233472  # bytes of a processor
    shared_block: int = 232448  # bytes that one block may ask for
    shared_reserved: int = 1024  # bytes that the system takes of every block

    @property
    def peak(self) -> float:
        """bfloat16 tensor flop/s."""
        return self.processors * self.ghz * 1e9 * self.tensor


GPUS = {
    80: Gpu("A100 SXM 80GB", 80, 108, 1.41, 2.039e12, 2048, 64, shared=167936, shared_block=166912),
    90: Gpu("H100 SXM", 90, 132, 1.83, 3.352e12, 4096, 128),
    100: Gpu("B200", 100, 148, 1.856, 8.0e12, 8192, 128, minmax=128),
    120: Gpu(
        "RTX 5090",
        120,
        170,
        2.407,
        1.792e12,
        512,
        128,
        add=128,
        warps=48,
        blocks=24,
        shared=102400,
        shared_block=101376,
    ),
}


@dataclass(frozen=True)
class AmdGpu:
    """One AMD GPU: kernels are compiled for it, no times are predicted.  Source: the CDNA 3 and RDNA 3 white papers."""

    name: str
    wave: int  # lanes
    processors: int  # compute units
    shared_block: int = 65536


AMD = {"gfx942": AmdGpu("MI300X", 64, 304), "gfx1100": AmdGpu("RX 7900 XTX", 32, 96)}


def blocks_per_processor(gpu: Gpu, registers: int, shared: int, threads: int) -> tuple[int, str]:
    """-> blocks that one processor holds at a time, and what limits them; 0 when even one does not fit.

    `registers` per thread, `shared` bytes per block (static and dynamic, without the system's own).  Registers are
    given out per warp in units of 256 and warps sit in four partitions; shared memory comes in units of 128 bytes
    (cuda_occupancy.h, which tests/gpu_without_gpu/test_static.py compiles and compares with).
    """
    warps = -(-threads // 32)
    if warps > 32 or registers > 255 or shared > gpu.shared_block:
        return 0, "too large"
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by = {
        "registers": gpu.registers // 4 // per_warp * 4 // warps,
        "shared memory": gpu.shared // (-(-(shared + gpu.shared_reserved) // 128) * 128),
        "warps": gpu.warps // warps,
        "blocks": gpu.blocks,
    }
    limit = min(by, key=lambda name: by[name])
    return by[limit], limit
