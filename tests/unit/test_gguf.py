"""GGUF files: read as the format's own library reads them, and clear errors for everything that is broken."""

import struct

import gguf
import numpy as np
import pytest

from dspark_stream.errors import ModelLoadError
from dspark_stream.models.gguf import GgufFile


def write(path, *, fields=True, tensors=True):
    writer = gguf.GGUFWriter(path, "llama")
    if fields:
        writer.add_uint32("some.number", 7)
        writer.add_float32("some.real", 0.5)
        writer.add_bool("some.truth", True)
        writer.add_string("some.words", "naïve")
        writer.add_array("some.texts", ["a", "", "日本"])
        writer.add_array("some.numbers", [1, -2, 3])
    if tensors:
        weights = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
        writer.add_tensor("norm", weights[0])
        writer.add_tensor("half", weights.astype(np.float16))
        for kind in (gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0):
            writer.add_tensor(kind.name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_everything_is_read_as_the_formats_library_reads_it(tmp_path):
    path = write(tmp_path / "a.gguf")
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.fields[name] == field.contents()
    assert ours.fields["some.texts"] == ["a", "", "日本"]
    assert set(ours.tensors) == {t.name for t in theirs.tensors}
    for tensor in theirs.tensors:
        assert ours.tensor(tensor.name).type == tensor.tensor_type
        assert ours.tensor(tensor.name).shape == tuple(int(n) for n in tensor.shape[::-1])
        np.testing.assert_array_equal(ours.bytes_of(tensor.name), np.asarray(tensor.data).reshape(-1).view(np.uint8))
    np.testing.assert_array_equal(ours.floats("norm"), theirs.get_tensor(0).data)
    assert ours.floats("half").shape == (6, 64)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not one of ours at all", b"GGUF" + struct.pack("<IQQ", 99, 0, 0)])
def test_what_is_no_gguf_file_is_said(tmp_path, content):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"a\.gguf"):
        GgufFile(path)
    with pytest.raises(ModelLoadError, match="missing"):
        GgufFile(tmp_path / "missing.gguf")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 400, 7), *range(400, len(whole), 97), len(whole) - 33]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelLoadError):
            GgufFile(path)


def test_a_file_with_any_byte_turned_never_crashes(tmp_path):
    whole = write(tmp_path / "whole.gguf").read_bytes()
    header = whole.index(b"Q8_0") + 60
    rng = np.random.default_rng(0)
    path = tmp_path / "turned.gguf"
    refused = 0
    for _ in range(400):
        broken = bytearray(whole)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            broken[at] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            file = GgufFile(path)
            for name in file.tensors:
                file.bytes_of(name)
        except ModelLoadError:
            refused += 1
    assert refused > 50


def test_a_tensor_that_is_not_there_or_not_in_floats(tmp_path):
    file = GgufFile(write(tmp_path / "a.gguf"))
    with pytest.raises(ModelLoadError, match="no tensor nothing"):
        file.bytes_of("nothing")
    with pytest.raises(ModelLoadError, match="Q8_0 is quantised"):
        file.floats("Q8_0")
