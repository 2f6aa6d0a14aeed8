"""One suite for every implementation of every operation.

In the ordinary run the references are tested against oracles written another way; the Triton kernels join them in a
process with ``TRITON_INTERPRET=1`` (`test_interpreter.py`), and on a GPU (`make test-gpu`).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
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
    """Triton's looks through all of its language at each call of a device function, `tl.sum` being one, to put its own
    functions there: once for each launch and module does. And it works out whether each sum of integers is too large,
    for an assertion that it then leaves out, as nothing is debugged. Together that is more than half of its time.
    """
    if not interpreted():
        yield
        return
    from triton.runtime import interpreter

    launch, done = interpreter.GridExecutor.__call__, set()

    def launch_anew(self: Any, *args: Any, **options: Any) -> None:
        done.clear()  # a launch that ends takes its patches back
        launch(self, *args, **options)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if id(self.fn.__globals__) not in done:
            interpreter._patch_lang(self.fn)
            done.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
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
