"""A recorded launch, compiled: the facts that decide whether it runs, and the code to count."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.static import sass
from bench.static.gpus import AMD, GPUS, blocks_per_processor
from bench.static.record import Launch


@dataclass(frozen=True, eq=False)
class Compiled:
    """A kernel for one NVIDIA target."""

    name: str
    capability: int
    registers: int  # per thread
    stack: int  # bytes per thread that ptxas keeps in local memory
    spills: int  # load and store instructions to local memory
    shared: int  # bytes per block, dynamic and static
    tensor_memory: int  # columns
    threads: int
    blocks: int  # per processor
    limited_by: str
    code: sass.Code
    ttir: str
    warps: int  # that compute: fewer than the block has where some only fetch operands or start matrix products

    @property
    def specialised(self) -> bool:
        """Whether parts of the source's loops run in warps of their own, at the same time."""
        return 32 * self.warps < self.threads

    @property
    def fits(self) -> bool:
        """Whether it can be launched, and keeps its values in registers."""
        return self.blocks > 0 and self.spills == 0 and self.stack == 0 and self.tensor_memory <= 512


def source(launch: Launch) -> Any:
    """The launch as Triton's run time would specialise it."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, name in enumerate(launch.kernel.arg_names):
        argument = launch.args.get(name)
        if argument is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
            continue
        number = argument.type in ("i32", "i64") and not launch.kernel.params[i].do_not_specialize
        if number and argument.value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = argument.type
            if argument.aligned and (number or argument.type[0] in "*t"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_triton(launch: Launch, target: int | str) -> Any:
    """Triton's compiled kernel for a compute capability or an AMD architecture; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget

    hip = isinstance(target, str)
    where = GPUTarget("hip", target, AMD[target].wave) if isinstance(target, str) else GPUTarget("cuda", target, 32)
    options = {k: v for k, v in launch.options.items() if not (hip and k == "num_ctas")}
    return triton.compile(source(launch), target=where, options=options)


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """The facts of a launch on an NVIDIA target."""
    kernel = compile_triton(launch, capability)
    warps = getattr(kernel.metadata, "num_warps", launch.options["num_warps"])
    tensor_memory = getattr(kernel.metadata, "tmem_size", 0) or 0
    return examine(
        kernel.asm["cubin"],
        capability,
        threads=32 * warps,
        dynamic=kernel.metadata.shared,
        tensor_memory=tensor_memory,
        ttir=kernel.asm["ttir"],
        warps=launch.options["num_warps"],
    )


def examine(
    cubin: bytes,
    capability: int,
    threads: int,
    dynamic: int,
    tensor_memory: int = 0,
    ttir: str = "",
    warps: int | None = None,
) -> Compiled:
    """The facts of a cubin with one kernel, launched with `dynamic` bytes of shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        ((name, used),) = sass.resources(path).items()
        code = sass.functions(path)[name]
    return _facts(name, used, code, capability, threads, dynamic, tensor_memory, ttir, warps)


def examine_all(cubin: Path, capability: int, threads: dict[str, int]) -> dict[str, Compiled]:
    """The facts of every kernel of a cubin, by its name; `threads` of a block, without dynamic shared memory."""
    codes = sass.functions(cubin)
    return {
        name: _facts(name, used, codes[name], capability, threads.get(name, 1024), 0, 0, "")
        for name, used in sorted(sass.resources(cubin).items())
    }


def _facts(
    name: str,
    used: dict[str, int],
    code: sass.Code,
    capability: int,
    threads: int,
    dynamic: int,
    tensor_memory: int,
    ttir: str,
    warps: int | None = None,
) -> Compiled:
    gpu = GPUS[capability]
    # cuobjdump counts the system's kilobyte of shared memory as the kernel's from 9.0 on
    static = used["shared"] - (gpu.shared_reserved if capability >= 90 and used["shared"] >= 1024 else 0)
    blocks, limit = blocks_per_processor(gpu, used["registers"], dynamic + static, threads)
    if tensor_memory:
        by_columns = 512 // _power_of_two(tensor_memory)
        blocks, limit = min((blocks, limit), (by_columns, "tensor memory"))
    spills = sum(instruction.group == "spill" for instruction in code.instructions)
    return Compiled(
        name,
        capability,
        used["registers"],
        used["stack"],
        spills,
        dynamic + static,
        tensor_memory,
        threads,
        blocks,
        limit,
        code,
        ttir,
        warps or threads // 32,
    )


def amd_facts(launch: Launch, architecture: str) -> dict[str, int]:
    """What the assembly of a launch says on an AMD architecture; registers are those of a lane.

    Scalar registers spill to lanes of a vector register, so only vector spills and scratch memory count.
    """
    kernel = compile_triton(launch, architecture)
    text = kernel.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    matrix = re.findall(r"^\s+(v_(?:mfma|wmma|smfmac)_\w+)", text, re.MULTILINE)
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "scratch": number("private_segment_fixed_size"),
        "shared": kernel.metadata.shared,
        "threads": AMD[architecture].wave * launch.options["num_warps"],
        "matrix": len(matrix),
    }


def _power_of_two(columns: int) -> int:
    """Tensor memory is given out in powers of two, 32 columns at least."""
    return max(32, 1 << (columns - 1).bit_length())
