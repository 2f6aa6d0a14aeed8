"""Memory: what there is, what is asked for, and what is foretold."""

from __future__ import annotations

import pytest

from dspark_stream.engine import memory
from dspark_stream.errors import ConfigError

GIB = 2**30


def test_a_container_may_have_less_than_the_machine(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (limit, tmp_path / "nothing"))
    whole = memory.memory_bytes()
    for text, expected in (("max\n", whole), ("1048576\n", 1 << 20), (str(1 << 62), whole)):
        limit.write_text(text)
        assert memory.memory_bytes() == expected


def test_more_than_there_is_names_flag_value_and_limit():
    memory.check_kv_memory(24 * GIB, 24 * GIB)
    memory.check_kv_memory(1024 * GIB, None)
    with pytest.raises(ConfigError) as caught:
        memory.check_kv_memory(1024 * GIB, 24 * GIB)
    assert caught.value.param == "kv_memory"
    assert all(word in str(caught.value) for word in ("--kv-memory", "1024GiB", "24GiB"))


@pytest.mark.parametrize("fault", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_an_allocation_that_fails_is_no_traceback(fault):
    with pytest.raises(ConfigError, match="--kv-memory of 2GiB") as caught, memory.refused_by_the_system(2 * GIB):
        raise fault
    assert caught.value.param == "kv_memory"


def test_what_is_foretold(monkeypatch):
    monkeypatch.setattr(memory, "resident_bytes", lambda: GIB // 2)
    monkeypatch.setattr(memory, "memory_bytes", lambda: 4 * GIB)
    assert memory.foretold(GIB) == "memory: 0.50 GiB now, up to 1.50 GiB at full load"
    assert "up to 1.75 GiB" in (memory.foretold(GIB, GIB // 4) or "")
    assert "more than there is (4.00 GiB)" in (memory.foretold(4 * GIB) or "")
    monkeypatch.setattr(memory, "resident_bytes", lambda: None)
    assert memory.foretold(GIB) is None
