"""GGUF files for tests, written by the format's own library."""

from pathlib import Path

import gguf
import numpy as np


def split(path: Path, count: int, *, everywhere: bool = False, **change: object) -> list[Path]:
    """Shards of a file beside it, as ``gguf-split`` makes them: fields in the first only, or ``everywhere``.

    ``change``: fields of the last shard to set otherwise, with ``_`` for ``.``.
    """
    reader = gguf.GGUFReader(path)
    paths = [path.with_name(f"{path.stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for i, shard in enumerate(paths):
        own = {"split.no": i, "split.count": count, "split.tensors.count": len(reader.tensors)}
        if i == count - 1:
            own |= {key.replace("_", "."): value for key, value in change.items()}
        writer = gguf.GGUFWriter(shard, reader.get_field("general.architecture").contents())
        writer.kv_data[0].pop("general.architecture")
        for key, field in reader.fields.items():
            if not key.startswith("GGUF.") and key not in own and (everywhere or i == 0):
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
        for key, value in own.items():
            if value is not None:
                add = writer.add_string if isinstance(value, str) else writer.add_uint16
                add(key, value)
        for n, tensor in enumerate(reader.tensors):
            if n % count == i:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def changed(
    path: Path,
    out: Path,
    fields: dict[str, object],
    tensors: dict[str, np.ndarray],
    kind: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """A copy of a file with some fields (strings, whole numbers, floats) more, and tensors more or otherwise, which are
    blocks of a ``kind`` where one is given.
    """
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
    writer.kv_data[0].pop("general.architecture")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for key, value in fields.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    for tensor in reader.tensors:
        if tensor.name not in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, data in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
