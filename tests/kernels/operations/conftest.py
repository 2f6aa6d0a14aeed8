"""One suite for every implementation of every operation.

In the ordinary run the references are tested against oracles written another way; the Triton kernels join them in a
process with ``TRITON_INTERPRET=1`` (`test_interpreter.py`), and on a GPU (`make test-gpu`).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from dspark_kernels.dispatch import interpreted

ON_GPU = torch.cuda.is_available()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", ["reference", *(["triton"] if ON_GPU or interpreted() else [])])


@pytest.fixture(autouse=True, scope="session")
def an_interpreter_that_does_nothing_twice() -> Iterator[None]:
    """Triton's works out anew what it knows, at every operation: more than two thirds of its time."""
    if not interpreted():
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    launch, launched = interpreter.GridExecutor.__call__, set()
    np_dtype, known = interpreter._get_np_dtype, {}

    def launch_anew(self: Any, *args: Any, **options: Any) -> None:
        launched.clear()  # a launch that ends takes its patches back
        launch(self, *args, **options)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        """Of a device function, `tl.sum` being one: its own functions are put into the language once a launch."""
        if id(self.fn.__globals__) not in launched:
            interpreter._patch_lang(self.fn)
            launched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **options)

    def known_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        return known[name] if name in known else known.setdefault(name, np_dtype(dtype))

    @cache
    def of_shape(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(size) for size in shape])

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.numel, self.shape = of_shape(tuple(kind.shape) if kind.is_block() else ())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_get_np_dtype", known_np_dtype)
        patch.setattr(tl.tensor, "__init__", tensor)
        # whether sums of integers are too large is for an assertion that is left out, as nothing is debugged
        assert not interpreter.interpreter_builder.options.debug
        options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a test live."""
    return torch.device("cuda" if ON_GPU and not interpreted() else "cpu")


@pytest.fixture
def load(implementation: str):
    """load("acceptance"): that operation's module of this implementation."""
    return lambda operation: importlib.import_module(f"dspark_kernels.{operation}.{implementation}")


@pytest.fixture
def dtypes(implementation: str) -> list[torch.dtype]:
    """Precisions to try; the interpreter does not know bfloat16."""
    return [torch.float32, torch.float16, *([] if implementation == "triton" and interpreted() else [torch.bfloat16])]


@pytest.fixture(autouse=True)
def poison():
    """New memory is NaN or as large as an integer can be: what a kernel forgets to write does not go unseen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
