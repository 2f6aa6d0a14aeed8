"""``dspark-stream profile``: the capacity curve of this machine and model, for people."""

from __future__ import annotations

from dspark_stream.load.curve import CapacityCurve
from dspark_stream.measure.plot import Chart, Series


def table(curve: CapacityCurve) -> str:
    """What passes, rounds and drafts take."""
    lines = [f"a target pass over B tokens of one stream at position {curve.context}, ms"]
    lines.append("  B        " + "".join(f"{n:>8}" for n in curve.tokens))
    lines.append("  pass     " + "".join(f"{ms:>8.2f}" for ms in curve.verify_ms))
    each = [ms / n for n, ms in zip(curve.tokens, curve.verify_ms, strict=True)]
    lines.append("  a token  " + "".join(f"{ms:>8.2f}" for ms in each))
    lines.append("rounds of R streams, ms")
    lines.append("  R        " + "".join(f"{n:>8}" for n in curve.streams))
    rounds = {"plain": [curve.round_ms(n, n, 0) for n in curve.streams]}
    if any(curve.draft_ms):
        rounds["draft 1"] = [curve.round_ms(n, n, n, slots=1) - curve.round_ms(n, n, 0) for n in curve.streams]
        rounds[f"draft {curve.gamma}"] = [curve.round_ms(n, n, n) - curve.round_ms(n, n, 0) for n in curve.streams]
    rounds["rest"] = curve.rest_ms or [0.0] * len(curve.streams)
    lines += [f"  {name:<9}" + "".join(f"{ms:>8.2f}" for ms in row) for name, row in rounds.items()]
    lines.append(
        f"a position of context costs a pass {curve.read_us:.2f} µs for each stream and {curve.attend_us:.2f} µs for "
        f"each row, drafting {curve.draft_read_us:.2f} µs for each stream; sampling costs "
        f"{curve.sample_us:.0f} µs a row; a position that the drafter learns of late costs {curve.feature_us:.1f} µs"
    )
    return "\n".join(lines)


def plot(curve: CapacityCurve) -> Chart:
    """The same as a picture."""
    series = [
        Series("pass, one stream", list(zip(curve.tokens, curve.verify_ms, strict=True))),
        Series("plain round", [(n, curve.round_ms(n, n, 0)) for n in curve.streams]),
    ]
    if any(curve.draft_ms):
        series.append(Series(f"drafting {curve.gamma}", list(zip(curve.streams, curve.draft_ms, strict=True))))
        plain = {n: curve.round_ms(n, n, 0) for n in curve.streams}
        series.append(Series("drafting 1", [(n, curve.round_ms(n, n, n, slots=1) - plain[n]) for n in curve.streams]))
    if curve.rest_ms:
        series.append(Series("the rest", list(zip(curve.streams, curve.rest_ms, strict=True))))
    return Chart(
        f"Capacity at position {curve.context}", "tokens, or streams", "milliseconds", series, log_x=True, log_y=True
    )
