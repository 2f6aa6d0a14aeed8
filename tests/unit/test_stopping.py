"""Signals while something is loaded, and the program's door."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from dspark_stream.stopping import Terminated, stop_signals, stoppable

KINDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated)]


def press(number):
    os.kill(os.getpid(), number)
    signal.pause()


def keep(number):
    """As libraries do at times."""
    with suppress(BaseException):
        press(number)


@pytest.mark.parametrize(("number", "kind"), KINDS)
def test_a_signal_ends_the_block_and_handlers_come_back(number, kind):
    before = [signal.getsignal(s) for s in stop_signals()]
    with pytest.raises(kind), stoppable():
        press(number)
    assert [signal.getsignal(s) for s in stop_signals()] == before


@pytest.mark.parametrize(("number", "kind"), KINDS)
def test_a_library_that_keeps_the_exception_does_not_keep_the_program(number, kind):
    """Guards against a Ctrl-C that an import swallows: the service starts as if nothing had been."""

    def load_and_serve(check):
        keep(number)
        check()
        pytest.fail("it went on")

    with pytest.raises(kind), stoppable():
        keep(number)
    with pytest.raises(kind), stoppable() as check:
        load_and_serve(check)


def test_a_library_that_makes_another_exception_of_it():
    """Guards against `ImportError: numpy.core failed`, with a traceback, where somebody pressed Ctrl-C."""

    def load():
        try:
            press(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("half a module") from None

    with pytest.raises(KeyboardInterrupt), stoppable():
        load()
    with pytest.raises(ImportError), stoppable():
        raise ImportError("a real one")


def test_an_exception_in_a_finaliser_is_not_told():
    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    told = []
    before, sys.unraisablehook = sys.unraisablehook, told.append
    try:
        with pytest.raises(KeyboardInterrupt), stoppable():
            Finalised()
    finally:
        sys.unraisablehook = before
    assert not told


def test_a_program_that_outlives_its_terminal_keeps_doing_so():
    """Guards against nohup that no longer works."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_the_flags_are_made_is_quiet():
    code = """
import os, signal, sys
from dspark_stream import __main__
from dspark_stream.commands import program
program._build_parser = lambda: os.kill(os.getpid(), signal.SIGINT)
sys.exit(__main__.main())
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("module", ["argparse", "dspark_stream.commands"])
def test_ctrl_c_while_the_program_is_imported_is_quiet(module):
    """Guards against pages of import lines for a key that was pressed early."""
    code = f"""
import os, signal, sys
class Pressed:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.modules.pop({module!r}, None)
sys.meta_path.insert(0, Pressed())
from dspark_stream.__main__ import main
sys.argv = ["dspark-stream", "models"]
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
