"""Compile every Triton kernel, as its launcher launches it, for a GPU that is not there.

The launchers run as they are, on CPU tensors of real shapes that nobody reads; instead of being launched, each kernel
is compiled for compute capability 9.0 (or ``--capability``), to PTX and through ptxas to machine code. Prints a line
for each: registers, bytes spilled and shared memory. A process of its own: Triton must not be in its interpreter.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that one program may have."""


OWN_SCRATCH = ("_walk", "_admit", "_weigh")
"""Kernels that read back what they wrote to memory themselves, after a barrier."""


TENSOR_CORES = ("_attend", "_product")
"""Kernels whose machine code is of another kind on a GPU of another generation."""


class AbsentGpu:
    """Just enough of a driver for compiling."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


seen: dict[str, Any] = {}


def compile_instead(self: JITFunction, grid: tuple[int, ...], few: bool) -> Any:
    """What ``kernel[grid]`` gives: compiles, keeps the result, launches nothing."""

    def launch(*args: Any, **options: Any) -> None:
        if few and self.__name__ not in TENSOR_CORES and any(name.split()[0] == self.__name__ for name in seen):
            return
        kernel = self.warmup(*args, grid=grid, **options)
        seen.setdefault(f"{self.__name__} {kernel.hash[:8]}", kernel)

    return launch


def resources(kernel: Any) -> str:
    """Registers, spills and shared memory, by cuobjdump of the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    assert found, text
    return f"{found[1]:>4} registers {found[2]:>5} bytes of stack {kernel.metadata.shared:>7} bytes shared"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90, choices=SHARED)
    parser.add_argument("--few", action="store_true", help="one variant of each kernel that uses no tensor cores")
    options = parser.parse_args()
    driver.set_active(AbsentGpu(options.capability))
    JITFunction.__getitem__ = lambda self, grid: compile_instead(self, grid, options.few)
    from kernel_shapes import launch_everything

    launch_everything(torch.device("cpu"))
    for name, kernel in seen.items():
        assert ".target sm_" + str(options.capability) in kernel.asm["ptx"], name
        assert ".nc." not in kernel.asm["ptx"], f"{name} reads through a cache that does not see what it wrote itself"
        if name.split()[0] in OWN_SCRATCH:
            assert "cp.async" not in kernel.asm["ptx"], f"{name} fetches ahead what it may not have written yet"
            assert "bar.sync" in kernel.asm["ptx"], f"{name} has lost its barriers"
        assert kernel.metadata.shared <= SHARED[options.capability], (
            f"{name} wants {kernel.metadata.shared} bytes shared"
        )
        print(f"{name:<36} {resources(kernel)}")
    print(f"{len(seen)} kernels compiled for sm_{options.capability} by Triton {triton.__version__}")


if __name__ == "__main__":
    main()
