"""For all tests, of this process and of those that they start."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Before torch reads them. Matrices this small are no faster on two threads, and a hundred times slower while somebody
# else computes; the tests themselves are what runs side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

CACHE = Path(__file__).parents[1] / "build" / "tests"
"""Where tests keep what they build and measure, from one run to the next: `make clean` removes it."""


def use_a_cache_of_its_own() -> None:
    """Of the user's only the models are taken, and the kernels that are built already."""
    name = "dspark-stream"
    theirs = Path(os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache") / name
    ours = CACHE / name
    (ours / "kernels").mkdir(parents=True, exist_ok=True)
    for path in (theirs / "models", *(theirs / "kernels").glob("*.so")):
        link = ours / path.relative_to(theirs)
        if theirs != ours and path.exists() and not link.exists():
            link.unlink(missing_ok=True)  # to what is no more
            with contextlib.suppress(FileExistsError):
                link.symlink_to(path)
    os.environ["XDG_CACHE_HOME"] = str(CACHE)
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))


use_a_cache_of_its_own()

LONGEST = (
    "tests/kernels/test_cpu.py::test_the_sanitizers_find_nothing",
    "tests/page/test_page.py",
    "tests/kernels/test_interpreter.py::test_kernels_agree_with_their_references",
    "tests/kernels/test_compiles.py",
    "tests/engine/test_gpu_round.py",
    "tests/unit/test_training_run.py",
    "tests/engine/test_real_model.py",
    "tests/unit/test_fetch.py",
    "tests/kernels/test_cpu.py",
)
"""What takes half a minute or more: workers begin with these, so that none is left with one at the end."""


def part_of(nodeid: str) -> str:
    """What one worker runs as a whole: a file, because its tests share models; a test that takes minutes is alone."""
    return nodeid if nodeid.split("[", maxsplit=1)[0] in LONGEST else nodeid.split("::", maxsplit=1)[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How tests are dealt out by ``-n``."""
    from xdist.scheduler import LoadScopeScheduling

    class Parts(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return part_of(nodeid)

    config.option.loadscopereorder = False
    return Parts(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # in one process the order is the files'
        places = {part: place for place, part in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(part_of(item.nodeid).split("[", maxsplit=1)[0], len(places)))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def in_a_hurry(load_or_measure: Callable[..., Any]) -> Callable[..., Any]:
    """Every size is run all the same, but not over and over."""

    def measure(*args: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dspark_stream.engine.profile.BUDGET_S", 1.0)
            return load_or_measure(*args, **options)

    return measure


@pytest.fixture(autouse=True, scope="session")
def cheap_starts() -> Iterator[None]:
    """An engine that starts looks through all of the heap for garbage, and one that ends gives all of it back to the
    collector: a quarter of a second a test beside torch and transformers. `engine/test_garbage.py` has the real thing.
    And it measures its machine for eight seconds on every core.
    """
    worker, build = (sys.modules.get(f"dspark_stream.engine.{name}") for name in ("worker", "build"))
    with pytest.MonkeyPatch.context() as patch:
        if build is not None:
            patch.setattr(build, "load_or_measure", in_a_hurry(build.load_or_measure))
        if worker is not None:
            nothing = dict.fromkeys(("collect", "freeze", "unfreeze", "set_threshold"), lambda *_: None)
            patch.setattr(worker, "gc", SimpleNamespace(**nothing))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Engines set torch's threads for their whole process: the next test has its one again."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def logs_end_with_their_test() -> Iterator[None]:
    """A command that ran in this process sends the log to a stream that is closed after its test."""
    root = logging.getLogger()
    level = root.level
    yield
    root.handlers = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]
    root.setLevel(level)
