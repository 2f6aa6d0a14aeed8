"""What the service counts, and how Prometheus reads it. vLLM's names with our prefix, so that its boards work."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence

from dspark_stream.types import EngineSnapshot

_TTFT_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_E2E_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_LAG_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

Labels = Sequence[tuple[str, str]]


class Histogram:
    """Prometheus' cumulative histogram, without labels."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self._counts)

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value``, as often as ``times`` says."""
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def lines(self, name: str) -> Iterable[str]:
        """Its lines of the text format."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.9g}"
        yield f"{name}_count {total}"


class Metrics:
    """Counters of the loop's side; the engine's come from its snapshot. Used from the loop only."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(_TTFT_S)
        self.inter_token_latency = Histogram(_ITL_S)
        self.e2e_latency = Histogram(_E2E_S)
        self.loop_lag = Histogram(_LAG_S)
        self.finished: Counter[str] = Counter()
        """Responses by how they ended."""
        self.refused: Counter[str] = Counter()
        """Requests and events by error code."""
        self.http: Counter[tuple[str, str, int]] = Counter()
        """Requests by method, route and status."""
        self.connections_open = 0
        self.connections_total = 0
        self.connections_cut: Counter[str] = Counter()
        """Connections that we ended, or took in only for probes, by reason."""
        self.heads_refused: Counter[str] = Counter()
        """Requests that could not be parsed, by error code."""
        self.handshakes_aborted = 0
        self.sockets_open = 0
        self.sockets_total = 0
        self.sockets_closed: Counter[int] = Counter()
        """By close code."""
        self.held_total = 0
        self.merged_deltas = 0

    def render(self, engine: EngineSnapshot, model: str, in_flight: int) -> str:
        """The whole page, in Prometheus' text format 0.0.4."""
        page = _Page(model)
        page.add("num_requests_running", "gauge", "Streams that the engine decodes.", engine.running)
        page.add("num_requests_waiting", "gauge", "Streams that wait for the engine.", engine.waiting)
        page.add("num_requests_held", "gauge", "Streams held for slow readers.", engine.held)
        page.add("num_requests_admitted", "gauge", "Places taken, tokenising included.", in_flight)
        total = engine.kv_tokens_total
        usage = engine.kv_tokens_used / total if total else 0.0
        page.add("kv_cache_usage_perc", "gauge", "KV cache in use; 1 is all.", usage)
        page.add("engine_alive", "gauge", "1 while the engine's thread lives.", int(engine.alive))
        page.add(
            "engine_last_step_age_seconds", "gauge", "Since the engine came round its loop.", engine.last_step_age_s
        )
        page.add("capacity_drift_ratio", "gauge", "Rounds take so many times what was profiled.", engine.capacity_drift)
        for name, text, value in (
            ("engine_rounds_total", "Verification rounds.", engine.rounds_total),
            ("spec_decode_num_drafts_total", "Drafts made.", engine.num_drafts_total),
            (
                "spec_decode_num_skipped_drafts_total",
                "Rounds of streams that were not drafted for, since it would not have paid.",
                engine.num_skipped_drafts_total,
            ),
            (
                "spec_decode_num_probes_total",
                "Rounds that drafted only to see whether it pays.",
                engine.num_probes_total,
            ),
            ("late_chunks_total", "Chunks later than their stream's bound.", engine.late_chunks_total),
            ("spec_decode_num_draft_tokens_total", "Draft tokens proposed.", engine.num_draft_tokens_total),
            ("spec_decode_num_scheduled_tokens_total", "Draft tokens verified.", engine.num_scheduled_tokens_total),
            ("spec_decode_num_accepted_tokens_total", "Draft tokens accepted.", engine.num_accepted_tokens_total),
            ("prompt_tokens_total", "Prompt tokens.", engine.prompt_tokens_total),
            ("generation_tokens_total", "Tokens written.", engine.generation_tokens_total),
        ):
            page.add(name, "counter", text, value)
        page.add_all(
            "spec_decode_num_accepted_tokens_per_pos_total",
            "counter",
            "Draft tokens accepted at each position of the block.",
            [((("position", str(i)),), n) for i, n in enumerate(engine.num_accepted_tokens_per_pos)],
        )
        page.histogram("time_to_first_token_seconds", "From a request to its first token.", self.time_to_first_token)
        page.histogram(
            "inter_token_latency_seconds",
            "Between tokens; a round's time shared by its tokens.",
            self.inter_token_latency,
        )
        page.histogram("e2e_request_latency_seconds", "From a request to its end.", self.e2e_latency)
        page.add_all(
            "request_success_total",
            "counter",
            "Responses by how they ended.",
            [((("finished_reason", reason),), n) for reason, n in sorted(self.finished.items())],
        )
        page.add_all(
            "requests_refused_total",
            "counter",
            "Requests and events refused, by error code.",
            [((("code", code),), n) for code, n in sorted(self.refused.items())],
        )
        page.histogram("loop_lag_seconds", "How late the event loop runs a timer.", self.loop_lag)
        page.add_all(
            "http_requests_total",
            "counter",
            "HTTP requests.",
            [
                ((("method", method), ("route", route), ("status", str(status))), n)
                for (method, route, status), n in sorted(self.http.items())
            ],
        )
        page.add("http_connections", "gauge", "Connections open, sockets included.", self.connections_open)
        page.add("http_connections_accepted_total", "counter", "Connections accepted.", self.connections_total)
        page.add_all(
            "http_connections_cut_total",
            "counter",
            "Connections that we ended (head_timeout, idle_timeout, unread, evicted) or took for probes only (limit).",
            [((("reason", reason),), n) for reason, n in sorted(self.connections_cut.items())],
        )
        page.add_all(
            "http_requests_malformed_total",
            "counter",
            "Requests that could not be parsed, by error code.",
            [((("code", code),), n) for code, n in sorted(self.heads_refused.items())],
        )
        page.add(
            "websocket_handshakes_aborted_total", "counter", "Clients gone while upgrading.", self.handshakes_aborted
        )
        page.add("websocket_connections", "gauge", "Sockets open.", self.sockets_open)
        page.add("websocket_connections_total", "counter", "Sockets opened.", self.sockets_total)
        page.add_all(
            "websocket_closed_total",
            "counter",
            "Sockets closed, by close code.",
            [((("code", str(code)),), n) for code, n in sorted(self.sockets_closed.items())],
        )
        page.add("slow_reader_holds_total", "counter", "Times a client's streams were held.", self.held_total)
        page.add("merged_deltas_total", "counter", "Deltas merged for slow readers.", self.merged_deltas)
        return page.text()


class _Page:
    def __init__(self, model: str) -> None:
        self._model = ("model_name", model)
        self._lines: list[str] = []

    def add(self, name: str, kind: str, text: str, value: float) -> None:
        self.add_all(name, kind, text, [((self._model,) if kind else (), value)])

    def add_all(self, name: str, kind: str, text: str, samples: Iterable[tuple[Labels, float]]) -> None:
        self._head(name, kind, text)
        for labels, value in samples:
            shown = ",".join(f'{key}="{_escape(label)}"' for key, label in labels)
            self._lines.append(f"dspark:{name}{{{shown}}} {value:.12g}")

    def histogram(self, name: str, text: str, histogram: Histogram) -> None:
        self._head(name, "histogram", text)
        self._lines.extend(histogram.lines(f"dspark:{name}"))

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def _head(self, name: str, kind: str, text: str) -> None:
        self._lines.append(f"# HELP dspark:{name} {text}")
        self._lines.append(f"# TYPE dspark:{name} {kind}")


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
