"""Integer kernels for CPUs: whole Llama-like layers over 4- and 8-bit weights, in C++ built on the machine."""

from dspark_kernels.cpu.build import Isa, NoCompilerError, best_isa, supported_isas
from dspark_kernels.cpu.library import Context, Head, Llama, PackedMatrix, Pass, Room, Source, Walked, Weights
from dspark_kernels.cpu.machine import cpu_name

__all__ = [
    "Context",
    "Head",
    "Isa",
    "Llama",
    "NoCompilerError",
    "PackedMatrix",
    "Pass",
    "Room",
    "Source",
    "Walked",
    "Weights",
    "best_isa",
    "cpu_name",
    "supported_isas",
]
