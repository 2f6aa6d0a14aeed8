"""GGUF files: read as the format's own library reads them, and clear errors for everything that is broken."""

import logging
import struct

import gguf
import numpy as np
import pytest

from dspark_stream.errors import ModelLoadError
from dspark_stream.models.gguf import TYPES, GgufFile
from dspark_stream.models.loading import _gguf_fingerprint, load_target
from ggufs import split


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


def test_types_are_those_of_the_formats_library():
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: theirs[kind] for kind in TYPES} == TYPES


def test_types_that_nothing_here_multiplies_are_read_and_called_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for kind, size in ((gguf.GGMLQuantizationType.IQ4_XS, 136), (gguf.GGMLQuantizationType.Q2_K, 84)):
        writer.add_tensor(kind.name, np.zeros((2, size), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "a.gguf")
    assert {name: (info.type_name, info.shape) for name, info in file.tensors.items()} == {
        "IQ4_XS": ("IQ4_XS", (2, 256)),
        "Q2_K": ("Q2_K", (2, 256)),
    }


def raw_file(fields=(), tensors=(), counts=None):
    """Bytes of a file with fields (name, type, bytes) and tensors (name, dimensions, type, offset)."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(fields))))
    out += b"".join(text(name) + struct.pack("<I", kind) + value for name, kind, value in fields)
    for name, shape, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return out + bytes(-len(out) % 32) + bytes(256)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (raw_file(tensors=[("w", (32,), 5, 0)]), "tensor w has the unknown type 5"),
        (raw_file(tensors=[("w", (32,), 99, 0)]), "tensor w has the unknown type 99"),
        (raw_file(tensors=[("w", (), 0, 0)]), "tensor w has 0 dimensions"),
        (raw_file(tensors=[("w", (1, 1, 1, 1, 1), 0, 0)]), "tensor w has 5 dimensions"),
        (raw_file(tensors=[("w", (33,), 20, 0)]), r"blocks of 32 \(IQ4_NL\)"),
        (raw_file(tensors=[("w", (2**40, 2**40), 0, 0)]), "ends within tensor w"),
        (raw_file(tensors=[("w", (8,), 0, 2**63)]), "ends within tensor w"),
        (raw_file(tensors=[("w", (8,), 0, 4)]), "tensor w begins at 4"),
        (raw_file(tensors=[("w", (8,), 0, 0), ("w", (8,), 0, 32)]), "tensor w is there twice"),
        (raw_file(counts=(2**60, 0)), f"{2**60} entries"),
        (raw_file(counts=(0, 2**60)), f"{2**60} entries"),
        (raw_file([("a", 4, bytes(4)), ("a", 4, bytes(4))]), "field a is there twice"),
        (raw_file([("a", 77, bytes(4))]), "unknown type 77"),
        (raw_file([("a", 8, struct.pack("<Q", 2**62))]), "ends too early"),
        (raw_file([("a", 9, struct.pack("<IQ", 8, 2**24))]), "ends too early"),
        (raw_file([("a", 9, struct.pack("<IQ", 10, 2**62))]), "an array of"),
        (raw_file([("a", 9, struct.pack("<IQ", 9, 1) * 20000)]), "without end"),
        (raw_file([("general.alignment", 4, bytes(4))]), "general.alignment is 0"),
        (raw_file([("general.alignment", 8, struct.pack("<Q", 2) + b"32")]), "general.alignment is '32'"),
        (raw_file([("general.alignment", 9, struct.pack("<IQ", 4, 0))]), "general.alignment is"),
        (raw_file([("split.count", 8, struct.pack("<Q", 1) + b"2")]), "split.count is '2'"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, said):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=said):
        GgufFile(path)


# --- split models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("everywhere", [True, False])
def test_shards_are_one_model(tmp_path, everywhere):
    whole = GgufFile(write(tmp_path / "a.gguf"))
    paths = split(whole.path, 3, everywhere=everywhere)
    for path in paths:
        file = GgufFile(path)
        assert (file.path, file.paths, file.name) == (paths[0], tuple(paths), "a")
        assert {k: v for k, v in file.fields.items() if not k.startswith("split.")} == whole.fields
        assert file.tensors.keys() == whole.tensors.keys()
        for name, info in whole.tensors.items():
            assert file.tensor(name)[:2] == info[:2]
            np.testing.assert_array_equal(file.bytes_of(name), whole.bytes_of(name))
        np.testing.assert_array_equal(file.floats("norm"), whole.floats("norm"))


def test_the_fingerprint_knows_all_shards(tmp_path):
    paths = split(write(tmp_path / "a.gguf"), 2)
    before = _gguf_fingerprint(GgufFile(paths[0]))
    assert _gguf_fingerprint(GgufFile(paths[1])) == before
    paths[1].write_bytes(paths[1].read_bytes() + bytes(32))
    assert _gguf_fingerprint(GgufFile(paths[0])) != before


def test_a_missing_shard_is_named(tmp_path):
    paths = split(write(tmp_path / "a.gguf"), 3)
    paths[1].unlink()
    for path in (paths[0], paths[2]):
        with pytest.raises(ModelLoadError, match=r"a-00002-of-00003\.gguf is missing"):
            GgufFile(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split_no": 0}, "says it is shard 1 of 2"),
        ({"split_count": 3}, "says it is shard 2 of 3"),
        ({"split_count": None}, "says it is shard 2 of 1"),
        ({"split_tensors_count": 9}, r"another model .*split\.tensors\.count"),
        ({"general_architecture": "qwen3"}, r"another model .*general\.architecture"),
    ],
)
def test_a_shard_of_another_model_is_refused(tmp_path, change, said):
    paths = split(write(tmp_path / "a.gguf"), 2, **change)
    with pytest.raises(ModelLoadError, match=said):
        GgufFile(paths[0])


def test_shards_that_do_not_fit_together(tmp_path):
    two = split(write(tmp_path / "a.gguf"), 2)
    alone = tmp_path / "model.gguf"
    alone.write_bytes(two[0].read_bytes())
    with pytest.raises(ModelLoadError, match="one of 2 shards"):
        GgufFile(alone)
    two[1].write_bytes(two[0].read_bytes())
    with pytest.raises(ModelLoadError, match="not what its name says"):
        GgufFile(two[1])
    other = split(write(tmp_path / "b.gguf", tensors=False), 2)
    split(tmp_path / "a.gguf", 2)
    two[1].write_bytes(other[1].read_bytes())
    with pytest.raises(ModelLoadError, match="another model"):
        GgufFile(two[0])
    split(tmp_path / "a.gguf", 2)
    two[1].write_bytes(two[1].read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match=r"a-00002-of-00002\.gguf.*ends"):
        GgufFile(two[0])


def test_a_family_that_is_not_known_is_refused_before_anything_is_promised(tmp_path, caplog):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="is a mamba; supported families: llama"):
        load_target(str(tmp_path / "a.gguf"), kernels=object())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
