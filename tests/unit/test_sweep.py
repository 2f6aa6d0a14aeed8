"""Loads against each other: what is compared with what, and what the report says about it."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET

import msgspec
import pytest

from dspark_stream.console import SILENT
from dspark_stream.engine.local import LocalEngine
from dspark_stream.load.costs import CapacityCurve
from dspark_stream.measure.plot import Chart, Series, line_chart, ticks
from dspark_stream.measure.profile import plot, table
from dspark_stream.measure.reproduce import QUICK, Findings, Plan, report, run, swings, verdict
from dspark_stream.measure.sweep import (
    Point,
    curve,
    gain_at_matched_throughput,
    gain_at_same_load,
    measure,
    medians,
    shipped_prompts,
)
from fakes import FakeTokenizer
from tiny import GAMMA, VOCAB, tiny_drafter, tiny_engine, tiny_rounds, tiny_target


def point(variant, streams, total, user, **more):
    values = {"temperature": 0.0, "accepted_length": 1.5, "verified": 1.0, "skipped": 0.2, "calibration_error": 0.01}
    return Point(variant=variant, streams=streams, tokens_per_s=total, tokens_per_s_user=user, **{**values, **more})


POINTS = [
    *(point("plain", s, t, u) for s, t, u in ((1, 100, 100), (4, 300, 75), (16, 600, 37))),
    *(point("fixed:1", s, t, u) for s, t, u in ((1, 120, 120), (4, 280, 70), (16, 480, 30))),
    *(point("fixed:4", s, t, u) for s, t, u in ((1, 150, 150), (4, 240, 60), (16, 320, 20))),
    *(point("adaptive", s, t, u) for s, t, u in ((1, 150, 150), (4, 380, 95), (16, 597, 37))),
]


def test_same_load_and_same_throughput_are_different_questions():
    same = gain_at_same_load(POINTS, "adaptive", "fixed:1", 0.0)
    assert same == pytest.approx({1: 1.25, 4: 380 / 280, 16: 597 / 480})
    matched = gain_at_matched_throughput(POINTS, "adaptive", "fixed:1", 0.0)
    # at 150 in all, one-token drafts are 30/160 of the way from (120, 120) to (280, 70)
    assert matched[1] == pytest.approx(150 / (120 - 50 * 30 / 160))
    assert matched[4] == pytest.approx(95 / (70 - 40 * 100 / 200))
    assert matched[16] is None  # 597 in all is more than one-token drafts ever make: nothing to compare with
    assert gain_at_matched_throughput(POINTS, "adaptive", "nothing", 0.0) == {1: None, 4: None, 16: None}


def test_repeats_are_compared_each_with_its_own():
    """Guards against texts of one repeat held against those of another: they accept differently by chance."""
    runs = [point("plain", 1, t, 1.0, repeat=i) for i, t in enumerate((100.0, 200.0, 400.0))]
    runs += [point("adaptive", 1, t, 1.0, repeat=i) for i, t in enumerate((150.0, 220.0, 480.0))]
    assert gain_at_same_load(runs, "adaptive", "plain", 0.0) == {1: pytest.approx(1.2)}  # of 1.5, 1.1 and 1.2


def test_medians_are_taken_run_by_run():
    runs = [point("plain", 2, t, 1.0, verified=t) for t in (1.0, 9.0, 3.0)]
    (one,) = medians(runs)
    assert (one.tokens_per_s, one.verified) == (3.0, pytest.approx(13 / 3))
    assert [p.streams for p in curve(POINTS, "plain", 0.0)] == [1, 4, 16]


CURVE = CapacityCurve(
    tokens=[1, 8],
    verify_ms=[5.0, 12.0],
    streams=[1, 4],
    draft_ms=[2.0, 4.0],
    slot_ms=[0.1, 0.2],
    gamma=7,
    context=256,
    read_us=2.0,
    attend_us=0.5,
)


def findings(points, differ=0, apart=None):
    info = tiny_engine(tiny_rounds(tiny_target(), tiny_drafter(tiny_target()))).info
    return Findings(
        info, Plan((1, 4, 16), (0.0,), 48, 9.0), 3, points, apart or {}, 18, differ, CURVE, "a machine <&>", 60.0
    )


def test_the_verdict_says_where_it_is_a_tax():
    good = "\n".join(verdict(findings(POINTS)))
    assert "(16 streams) the adaptive schedule makes 0.99 times the tokens of plain decoding: never a tax" in good
    assert "1 stream alone gets 1.50 times" in good
    assert "1.36 to 1.90 times the speed of one-token drafts" in good
    assert "18 of 18 greedy and coupled texts" in good
    bad = [*POINTS[:-1], msgspec.structs.replace(POINTS[-1], tokens_per_s=500.0)]
    said = "\n".join(verdict(findings(bad, differ=2)))
    assert "makes 0.83 times the tokens of plain decoding: there it is a tax" in said
    assert "16 of 18" in said
    assert "Noise" not in said
    said = "\n".join(verdict(findings(bad, apart={(0.0, 1): 0.01, (0.0, 4): 0.05, (0.0, 16): 0.2})))
    assert (
        "0.83 times the tokens of plain decoding: never a tax, within noise (two runs of plain decoding were 20%"
        in said
    )
    assert "5% apart in the median and 20% at most" in said


def test_a_noisy_load_does_not_excuse_a_quiet_one():
    """Guards against a tax that is not told since another load, where nothing can be known, looks worse."""
    slow = [
        msgspec.structs.replace(p, tokens_per_s=0.9 * p.tokens_per_s) if p.variant == "plain" else p for p in POINTS
    ]
    points = [
        msgspec.structs.replace(p, tokens_per_s={1: 80.0, 4: 243.0, 16: 540.0}[p.streams])
        if p.variant == "adaptive"
        else p
        for p in slow
    ]  # 0.89, 0.90 and 1.00 of plain
    said = "\n".join(verdict(findings(points, apart={(0.0, 1): 0.3, (0.0, 4): 0.01, (0.0, 16): 0.01})))
    assert "(4 streams) the adaptive schedule makes 0.90 times the tokens of plain decoding: there it is a tax" in said


def test_noise_is_how_far_runs_of_plain_decoding_in_one_turn_are_apart():
    runs = [
        *(
            point("plain", 4, rate, 1.0, repeat=repeat)
            for repeat, rate in ((0, 100.0), (0, 90.0), (1, 50.0), (1, 49.0))
        ),
        *(point("adaptive", 4, rate, 1.0) for rate in (1.0, 9.0)),
    ]
    assert swings(runs) == {(0.0, 4): pytest.approx(0.1)}


def test_the_report_stands_alone_and_is_well_formed():
    page = report(findings(POINTS))
    assert "a machine &lt;&amp;&gt;" in page
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    for drawing in page.split("<svg")[1:]:
        ET.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
    for variant in ("plain", "fixed:1", "fixed:4", "adaptive"):
        assert page.count(f"<td>{variant}</td>") == 3


class TinyTokenizer(FakeTokenizer):
    """Bytes, folded into the tiny vocabulary."""

    def encode(self, text):
        return [2 + b % (VOCAB - 2) for b in text.encode()][:40]

    def decode(self, ids):
        return "".join(chr(48 + i) for i in ids)


def test_everything_is_measured_on_a_real_engine():
    """Guards against a report that runs on made-up numbers only: the whole command's work, on tiny models."""
    target = tiny_target()
    engine = tiny_engine(tiny_rounds(target, tiny_drafter(target)))
    with LocalEngine(engine) as local:
        found = run(engine, local, TinyTokenizer(), shipped_prompts()[:3], QUICK, SILENT)
        one, tally = measure(
            engine, local, TinyTokenizer(), shipped_prompts(), variant="fixed:2", streams=2, temperature=1.0, tokens=9
        )
        again, same = measure(
            engine, local, TinyTokenizer(), shipped_prompts(), variant="fixed:2", streams=2, temperature=1.0, tokens=9
        )
        other, others = measure(
            engine, local, TinyTokenizer(), shipped_prompts(), variant="fixed:2", streams=2, temperature=1.0, tokens=9,
            least=20, repeat=1,
        )  # fmt: skip
    assert {(p.variant, p.streams) for p in found.points} == {
        (v, s) for v in ("plain", "fixed:1", f"fixed:{GAMMA}", "adaptive") for s in QUICK.streams
    }
    assert (found.repeats, found.texts_that_differ) == (1, 0)
    assert found.texts_compared == 9
    assert all(p.tokens_per_s > 0 for p in found.points)
    assert one.verified == 2.0
    assert (tally.prompts, same.prompts, others.prompts) == (12, 12, 20)
    assert (one.repeat, again.repeat, other.repeat) == (0, 0, 1)
    drawn = [sorted(r.bonus for r in some.rounds if r.start < 60) for some in (tally, same, others)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2][: len(drawn[0])]
    assert one.accepted_length == pytest.approx(1 + sum(r.accepted for r in tally.rounds) / len(tally.rounds))
    assert "too short" in verdict(found)[-1]
    assert "svg" in report(found)


def test_ticks_are_round_and_enclose():
    assert ticks(0.0, 95.0) == [0, 20, 40, 60, 80, 100]
    assert ticks(3.0, 700.0, log=True) == [2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert ticks(5.0, 5.0, log=True) == [5, 10]
    assert ticks(0.0, 0.0) == [0.0, 1.0]


def test_a_chart_survives_what_it_may_be_given():
    for log in (False, True):
        series = [Series("one & two", [(0, 0), (1, 5)]), Series("empty", [])]
        drawing = line_chart("a < b", "x", "y", series, log_x=log, log_y=log)
        ET.fromstring(drawing)
        assert "one &amp; two" in drawing


def test_the_capacity_curve_as_a_table_and_a_picture():
    shown = table(CURVE)
    assert "12.00" in shown
    assert "1.50" in shown  # 12 ms over 8 tokens
    assert "1.40" in shown  # drafting a token for one stream
    ET.fromstring(plot(CURVE).svg())


def test_the_same_picture_in_pixels():
    """Guards against a picture that leaves out what the SVG shows: every colour of it, and the turned label."""
    image = pytest.importorskip("PIL.Image")
    chart = Chart("title", "x", "upright", [Series("one", [(1, 1), (2, 4)]), Series("two", [(1, 4), (2, 1)])])
    with image.open(io.BytesIO(chart.png())) as picture:
        assert (picture.format, picture.size) == ("PNG", (1280, 800))
        colours = {colour for _, colour in picture.getcolors(1 << 20)}
        assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (255, 255, 255)} <= colours
        left = picture.crop((0, 200, 40, 600)).convert("L")
        assert left.getextrema()[0] < 100  # the label
        assert left.crop((0, 0, 40, 100)).getextrema()[0] == 255  # and nothing beside it
