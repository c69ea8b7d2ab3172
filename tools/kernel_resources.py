#!/usr/bin/env python3
"""Compile every Triton kernel for GPUs that need not be there, and print what each takes of a multiprocessor.

python tools/kernel_resources.py                       # sm_80, sm_90 and sm_100, bf16 and fp32
python tools/kernel_resources.py --capability 90 --dtype bf16
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peer_scale.kernels import triton_gated, triton_gelu, triton_norm, triton_residual, triton_vocab
from peer_scale.kernels.vocab_chunk import BLOCK

SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that one block may have, by compute capability (CUDA C programming guide)."""
REGISTERS_OF_A_THREAD, REGISTERS_OF_A_BLOCK = 255, 65536
DTYPES = ("bf16", "fp32")


@dataclass(frozen=True)
class Resources:
    """What a block of a compiled kernel takes.

    Attributes:
        kernel: its name.
        capability: of the GPU it was compiled for, as in sm_90.
        dtype: of its main tensors.
        threads: in a block.
        registers: of a thread.
        spilled: bytes of a thread in memory, for want of registers.
        shared: bytes of the block.
    """

    kernel: str
    capability: int
    dtype: str
    threads: int
    registers: int
    spilled: int
    shared: int

    @property
    def fits(self) -> bool:
        """Whether the chip runs it, and without memory in the place of registers."""
        return (
            self.registers <= REGISTERS_OF_A_THREAD
            and self.registers * self.threads <= REGISTERS_OF_A_BLOCK
            and self.spilled == 0
            and self.shared <= SHARED_LIMITS[self.capability]
        )


def signatures(dtype: str) -> list[tuple[Any, list[str], dict[str, Any]]]:
    """List the kernels with their arguments' types and their constants, which are those of their launches.

    Rows of the norm are as long as those of the large models.
    """
    low, one, sizes = f"*{dtype}", "*fp32", ["i32", "i32"]
    norm = {**triton_norm.tile(1024), "HAS_DROPOUT": True}
    norm_backward = [low, low, one, one, low, low, low, one, "i32", *sizes, "fp32", "*i64"]
    add_up = [low, one, one, one, "*fp64", "*i32", *sizes, "i32"]
    gradient = [low, one, one, "*i64", one, low, one, *sizes]
    gate, residual = ({"HAS_BIAS": True, **module.TILE} for module in (triton_gated, triton_residual))
    return [
        (triton_norm.norm_forward, [*[low] * 7, one, one, "i32", "fp32", "fp32", "*i64"], norm),
        (triton_norm.norm_backward, norm_backward, {**norm, "ROWS": triton_norm.ROWS}),
        (triton_residual.residual_forward, [low, low, low, low, "*i64", "fp32", *sizes], residual),
        (triton_residual.residual_backward, [low, low, one, "*i64", "fp32", *sizes], residual),
        (triton_gelu.gelu_forward, [low, low, low, *sizes], triton_gelu.TILE),
        (triton_gelu.gelu_backward, [low, low, low, low, one, *sizes], triton_gelu.TILE),
        (triton_gated.gate_forward, [low, low, low, *sizes], {**gate, "IS_GELU": True}),
        (triton_gated.gate_backward, [low, low, low, low, one, *sizes], {**gate, "IS_GELU": True}),
        (triton_vocab.add_up_kernel, add_up, {**triton_vocab.SUMS_TILE, "COLUMNS": BLOCK}),
        (triton_vocab.gradient_kernel, gradient, triton_vocab.GRADIENT_TILE),
    ]


def compiled_kernels(capabilities: tuple[int, ...], dtypes: tuple[str, ...] = DTYPES) -> Iterator[Resources]:
    """Compile every kernel to machine code, and read from it what it takes."""
    for capability, dtype in itertools.product(capabilities, dtypes):
        for kernel, types, constants in signatures(dtype):
            constexprs = {name: value for name, value in constants.items() if name != "num_warps"}
            signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constexprs), strict=True))
            # torch's memory begins at multiples of 16, and so do rows
            aligned = {(i,): [["tt.divisibility", 16]] for i, of in enumerate(types) if of[0] == "*" or of == "i32"}
            source = ASTSource(kernel, signature, constexprs, aligned)
            options = {"num_warps": constants["num_warps"]}
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert re.search(rf"\.target sm_{capability}a?\b", compiled.asm["ptx"]), "compiled for another target"
            used = _usage(compiled.asm["cubin"])
            yield Resources(
                kernel.__name__,
                capability,
                dtype,
                threads=32 * compiled.metadata.num_warps,
                registers=used["REG"],
                spilled=used["STACK"] + used["LOCAL"],
                shared=compiled.metadata.shared,
            )


def _usage(machine_code: bytes) -> dict[str, int]:
    """Ask the disassembler that comes with Triton; what it says of shared memory leaves out what a launch adds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(machine_code)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def table(rows: list[Resources]) -> str:
    """A table for the documentation: a line per kernel and format, a column per GPU."""
    capabilities = sorted({row.capability for row in rows})
    head = ["kernel", "format", "threads", *(f"sm_{each}" for each in capabilities)]
    lines = [head, ["---"] * len(head)]
    by_kernel = {(row.kernel, row.dtype, row.capability): row for row in rows}
    for kernel, dtype in dict.fromkeys((row.kernel, row.dtype) for row in rows):
        of_gpus = [by_kernel[kernel, dtype, each] for each in capabilities]
        cells = [f"{row.registers}, {row.shared:,} B" + ("" if row.fits else " DOES NOT FIT") for row in of_gpus]
        lines.append([f"`{kernel}`", dtype, str(of_gpus[0].threads), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Print the table; 1 where a kernel does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", nargs="+", type=int, choices=list(SHARED_LIMITS), default=list(SHARED_LIMITS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args()
    rows = list(compiled_kernels(tuple(args.capability), tuple(args.dtype)))
    print(table(rows))
    return 0 if all(row.fits for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
