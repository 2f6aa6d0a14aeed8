"""Integer kernels for CPUs: whole Llama-like layers over weights of 4 to 8 bits, in C++ built on the machine."""

from dspark_kernels.cpu.build import Isa, NoCompilerError, best_isa, supported_isas
from dspark_kernels.cpu.library import (
    Context,
    EditedBlock,
    Head,
    Kind,
    Llama,
    PackedMatrix,
    Pass,
    Room,
    Rope,
    Source,
    Table,
    Walked,
    Weights,
    best_tokens,
    edit_rows,
    sampling_rows,
)
from dspark_kernels.cpu.machine import cpu_name

__all__ = [
    "Context",
    "EditedBlock",
    "Head",
    "Isa",
    "Kind",
    "Llama",
    "NoCompilerError",
    "PackedMatrix",
    "Pass",
    "Room",
    "Rope",
    "Source",
    "Table",
    "Walked",
    "Weights",
    "best_isa",
    "best_tokens",
    "cpu_name",
    "edit_rows",
    "sampling_rows",
    "supported_isas",
]
