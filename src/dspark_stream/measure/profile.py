"""``dspark-stream profile``: the capacity curve of this machine and model, for people."""

from __future__ import annotations

from dspark_stream.load.costs import CapacityCurve, Company
from dspark_stream.measure.plot import Chart, Series


def table(curve: CapacityCurve) -> str:
    """What passes and drafts take."""
    lines = [f"a target pass over B tokens at position {curve.context}, ms"]
    lines.append("  B        " + "".join(f"{n:>8}" for n in curve.tokens))
    lines.append("  pass     " + "".join(f"{ms:>8.2f}" for ms in curve.verify_ms))
    each = [ms / n for n, ms in zip(curve.tokens, curve.verify_ms, strict=True)]
    lines.append("  a token  " + "".join(f"{ms:>8.2f}" for ms in each))
    if any(curve.draft_ms):
        lines.append("drafting for R streams, ms")
        lines.append("  R        " + "".join(f"{n:>8}" for n in curve.streams))
        for slots in sorted({1, curve.gamma}):
            row = curve.drafting_ms(curve.streams, slots, Company(1, curve.context)).tolist()
            lines.append(f"  tokens {slots:<2}" + "".join(f"{ms:>8.2f}" for ms in row))
    lines.append(
        f"a position of context costs a pass {curve.read_us:.2f} µs for each stream and {curve.attend_us:.2f} µs for "
        f"each row; a position that the drafter learns of late costs {curve.feature_us:.1f} µs"
    )
    return "\n".join(lines)


def plot(curve: CapacityCurve) -> Chart:
    """The same as a picture."""
    series = [Series("pass", list(zip(curve.tokens, curve.verify_ms, strict=True)))]
    if any(curve.draft_ms):
        for slots in sorted({1, curve.gamma}):
            row = curve.drafting_ms(curve.streams, slots, Company(1, curve.context)).tolist()
            series.append(Series(f"drafting {slots}", list(zip(curve.streams, row, strict=True))))
    return Chart(
        f"Capacity at position {curve.context}", "tokens, or streams", "milliseconds", series, log_x=True, log_y=True
    )
