"""Integer kernels for CPUs: whole Llama-like layers over weights of 4 to 8 bits, in C++ built on the machine."""

from dspark_kernels.cpu.binding import Context, Room, Rooms
from dspark_kernels.cpu.build import Isa, NoCompilerError, best_isa, supported_isas
from dspark_kernels.cpu.head import LARGEST_RANK, Head, Walked
from dspark_kernels.cpu.llama import LayerWeights, Llama, Pass, Rope
from dspark_kernels.cpu.machine import cpu_name
from dspark_kernels.cpu.matrix import GROUP, Kind, PackedMatrix, Source, Table
from dspark_kernels.cpu.sampling import EditedBlock, Weights, best_tokens, edit_rows, noise_rows, race, sampling_rows
from dspark_kernels.cpu.store import LANES, RING_GRAIN, Store

__all__ = [
    "GROUP",
    "LANES",
    "LARGEST_RANK",
    "RING_GRAIN",
    "Context",
    "EditedBlock",
    "Head",
    "Isa",
    "Kind",
    "LayerWeights",
    "Llama",
    "NoCompilerError",
    "PackedMatrix",
    "Pass",
    "Room",
    "Rooms",
    "Rope",
    "Source",
    "Store",
    "Table",
    "Walked",
    "Weights",
    "best_isa",
    "best_tokens",
    "cpu_name",
    "edit_rows",
    "noise_rows",
    "race",
    "sampling_rows",
    "supported_isas",
]
