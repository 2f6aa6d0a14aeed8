"""Progress: a moving bar on a terminal, lines elsewhere, nothing where it was turned off."""

import io
from contextlib import suppress

from dspark_stream.console import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_a_bar_that_ends_with_its_line():
    stream = Terminal()
    with Progress(stream).bar("eating", total=4) as bar:
        for _ in range(4):
            bar.advance()
    shown = stream.getvalue()
    assert shown.startswith("\reating:   0%")
    assert "4/4" in shown.split("\r")[-1]
    assert shown.endswith("\n")
    assert shown.count("\n") == 1


def test_a_log_sees_whole_lines_and_few_of_them():
    stream = io.StringIO()
    with Progress(stream).bar("eating", total=1000) as bar:
        for _ in range(1000):
            bar.advance(note="slowly")
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("eating: 100% 1000/1000")
    assert "slowly" in line
    assert "\r" not in line


def test_bytes_are_shown_in_their_own_units():
    stream = io.StringIO()
    with Progress(stream).bar("fetching", total=5_000_000, unit="B") as bar:
        bar.reach(2_500_000)
    assert "50% 2.50M/5.00M" in stream.getvalue()


def test_work_without_a_known_end():
    stream = io.StringIO()
    with Progress(stream).bar("reading", total=None) as bar:
        bar.advance(3)
    assert "3" in stream.getvalue()


def test_a_failure_leaves_the_bar_where_it_was():
    stream = io.StringIO()
    with suppress(ValueError), Progress(stream).bar("eating", total=4) as bar:
        bar.advance()
        raise ValueError
    assert "25% 1/4" in stream.getvalue()


def test_a_stage_says_its_name_at_once():
    stream = io.StringIO()
    with Progress(stream).stage("loading"):
        assert stream.getvalue() == "loading …\n"


def test_silence():
    stream = Terminal()
    progress = Progress(stream, enabled=False)
    progress.say("hello")
    with progress.stage("loading"), progress.bar("eating", total=2) as bar:
        bar.advance()
    assert stream.getvalue() == ""


def test_no_work_shows_no_bar():
    for stream in (Terminal(), io.StringIO()):
        with Progress(stream).bar("eating", total=0):
            pass
        assert stream.getvalue() == ""


def test_seconds_have_no_rate():
    for stream in (Terminal(), io.StringIO()):
        with Progress(stream).bar("training", total=60, unit="s") as bar:
            bar.reach(30)
        shown = stream.getvalue()
        assert "50%" in shown
        assert "s/s" not in shown
