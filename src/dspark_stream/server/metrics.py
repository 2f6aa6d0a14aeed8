"""What the service counts, and how Prometheus reads it. vLLM's names with our prefix, so that its boards work."""

from __future__ import annotations

import platform
from collections import Counter

from dspark_stream import __version__
from dspark_stream.server.exposition import Histogram, Page
from dspark_stream.server.process import read_process
from dspark_stream.types import EngineSnapshot, FinishedEvent, ModelInfo

_TTFT_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_E2E_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_PART_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_LAG_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Metrics:
    """Counters of the loop's side; the engine's come from its snapshot. Used from the loop only."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(_TTFT_S)
        self.inter_token_latency = Histogram(_ITL_S)
        self.inter_chunk_gap = Histogram(_ITL_S)
        self.e2e_latency = Histogram(_E2E_S)
        self.queue_time = Histogram(_PART_S)
        self.prefill_time = Histogram(_PART_S)
        self.decode_time = Histogram(_PART_S)
        self.inference_time = Histogram(_PART_S)
        self.time_per_output_token = Histogram(_ITL_S)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
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
        self.client_responses: Counter[str] = Counter()
        self.client_prompt_tokens: Counter[str] = Counter()
        self.client_generation_tokens: Counter[str] = Counter()
        """By the label of the key; empty where keys have none."""

    def finish(self, event: FinishedEvent, e2e_s: float) -> None:
        """A response that the engine ended; ``e2e_s`` seconds after it had come."""
        usage = event.usage
        self.finished[event.reason] += 1
        self.e2e_latency.observe(e2e_s)
        if event.reason == "failed":
            return  # its figures stop where it did, and would pass for quick ones
        self.queue_time.observe(usage.queue_ms / 1e3)
        self.prefill_time.observe(usage.prefill_ms / 1e3)
        self.decode_time.observe(usage.decode_ms / 1e3)
        self.inference_time.observe((usage.prefill_ms + usage.decode_ms) / 1e3)
        if usage.output_tokens > 1:
            self.time_per_output_token.observe(usage.decode_ms / 1e3 / (usage.output_tokens - 1))
        self.prompt_tokens.observe(usage.input_tokens)
        self.generation_tokens.observe(usage.output_tokens)

    def of_client(self, label: str, input_tokens: int, output_tokens: int) -> None:
        """A response of the key with this label is over, however it ended."""
        self.client_responses[label] += 1
        self.client_prompt_tokens[label] += input_tokens
        self.client_generation_tokens[label] += output_tokens

    def render(self, engine: EngineSnapshot, info: ModelInfo, in_flight: int, *, open_metrics: bool = False) -> str:
        """The whole page, in Prometheus' text format 0.0.4 or as OpenMetrics 1.0."""
        page = Page([("model_name", info.model)], open_metrics=open_metrics)
        _add_engine(page, engine, in_flight)
        self._add_requests(page)
        self._add_connections(page)
        _add_process(page, info)
        return page.text()

    def _add_requests(self, page: Page) -> None:
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From a request to its first token.", self.time_to_first_token),
            (
                "inter_token_latency_seconds",
                "Between tokens; a round's time shared by its tokens.",
                self.inter_token_latency,
            ),
            (
                "inter_chunk_gap_seconds",
                "Between two chunks of text sent to a reader, of one stream.",
                self.inter_chunk_gap,
            ),
            ("e2e_request_latency_seconds", "From a request to its end.", self.e2e_latency),
            ("request_queue_time_seconds", "Waiting for a place in the engine.", self.queue_time),
            ("request_prefill_time_seconds", "Reading the prompt.", self.prefill_time),
            ("request_decode_time_seconds", "From the first token to the last.", self.decode_time),
            ("request_inference_time_seconds", "Prefill and decode together.", self.inference_time),
            (
                "request_time_per_output_token_seconds",
                "A request's decode time for each of its tokens after the first.",
                self.time_per_output_token,
            ),
            ("request_prompt_tokens", "A request's prompt tokens.", self.prompt_tokens),
            ("request_generation_tokens", "A request's generated tokens.", self.generation_tokens),
        ):
            page.histogram(f"dspark:{name}", text, histogram)
        _add_counters(page, "request_success", "Responses by how they ended.", "finished_reason", self.finished)
        _add_counters(page, "requests_refused", "Requests and events refused, by error code.", "code", self.refused)
        for name, text, counts in (
            ("client_responses", "Responses by the label of the client's key.", self.client_responses),
            ("client_prompt_tokens", "Prompt tokens by the label of the key.", self.client_prompt_tokens),
            ("client_generation_tokens", "Tokens written by the label of the key.", self.client_generation_tokens),
        ):
            _add_counters(page, name, text, "client", counts)

    def _add_connections(self, page: Page) -> None:
        page.histogram("dspark:loop_lag_seconds", "How late the event loop runs a timer.", self.loop_lag)
        page.add_all(
            "dspark:http_requests",
            "counter",
            "HTTP requests; 101 is a socket that was opened and is over, 499 a client that left before its answer.",
            [
                ((("method", method), ("route", route), ("status", str(status))), n)
                for (method, route, status), n in sorted(self.http.items())
            ],
        )
        page.add("dspark:http_connections", "gauge", "Connections open, sockets included.", self.connections_open)
        page.add("dspark:http_connections_accepted", "counter", "Connections accepted.", self.connections_total)
        _add_counters(
            page,
            "http_connections_cut",
            "Connections that we ended (head_timeout, idle_timeout, unread, evicted) or took for probes only (limit).",
            "reason",
            self.connections_cut,
        )
        malformed = "Requests that could not be parsed, by error code."
        _add_counters(page, "http_requests_malformed", malformed, "code", self.heads_refused)
        aborted = "Clients gone while upgrading."
        page.add("dspark:websocket_handshakes_aborted", "counter", aborted, self.handshakes_aborted)
        page.add("dspark:websocket_connections", "gauge", "Sockets open.", self.sockets_open)
        page.add("dspark:websocket_opened", "counter", "Sockets opened.", self.sockets_total)
        codes = Counter({str(int(code)): n for code, n in self.sockets_closed.items()})
        _add_counters(page, "websocket_closed", "Sockets closed, by close code.", "code", codes)
        page.add("dspark:slow_reader_holds", "counter", "Times a client's streams were held.", self.held_total)
        page.add("dspark:merged_deltas", "counter", "Deltas merged for slow readers.", self.merged_deltas)


def _add_counters(page: Page, name: str, text: str, label: str, counts: Counter[str]) -> None:
    page.add_all(f"dspark:{name}", "counter", text, [(((label, value),), n) for value, n in sorted(counts.items())])


def _add_engine(page: Page, engine: EngineSnapshot, in_flight: int) -> None:
    total = engine.kv_tokens_total
    for name, text, value in (
        ("num_requests_running", "Streams that the engine decodes.", engine.running),
        ("num_requests_waiting", "Streams that wait for the engine.", engine.waiting),
        ("num_requests_held", "Streams held for slow readers.", engine.held),
        ("num_requests_admitted", "Places taken, tokenising included.", in_flight),
        ("kv_cache_usage_perc", "KV cache in use; 1 is all.", engine.kv_tokens_used / total if total else 0.0),
        ("engine_alive", "1 while the engine's thread lives.", int(engine.alive)),
        ("engine_last_step_age_seconds", "Since the engine came round its loop.", engine.last_step_age_s),
        ("capacity_drift_ratio", "Rounds take so many times what was profiled.", engine.capacity_drift),
    ):
        page.add(f"dspark:{name}", "gauge", text, value)
    for name, text, value in (
        ("engine_rounds", "Verification rounds.", engine.rounds_total),
        ("spec_decode_num_drafts", "Drafts made.", engine.num_drafts_total),
        (
            "spec_decode_num_skipped_drafts",
            "Rounds of streams that were not drafted for, since it would not have paid.",
            engine.num_skipped_drafts_total,
        ),
        (
            "spec_decode_num_probes",
            "Looks: some rounds run another way, to learn.",
            engine.num_probes_total,
        ),
        ("late_chunks", "Chunks later than their stream's bound.", engine.late_chunks_total),
        ("spec_decode_num_draft_tokens", "Draft tokens proposed.", engine.num_draft_tokens_total),
        ("spec_decode_num_scheduled_tokens", "Draft tokens verified.", engine.num_scheduled_tokens_total),
        ("spec_decode_num_accepted_tokens", "Draft tokens accepted.", engine.num_accepted_tokens_total),
        ("prompt_tokens", "Prompt tokens.", engine.prompt_tokens_total),
        ("generation_tokens", "Tokens written.", engine.generation_tokens_total),
    ):
        page.add(f"dspark:{name}", "counter", text, value)
    page.add_all(
        "dspark:spec_decode_num_accepted_tokens_per_pos",
        "counter",
        "Draft tokens accepted at each position of the block.",
        [((("position", str(i)),), n) for i, n in enumerate(engine.num_accepted_tokens_per_pos)],
    )


def _add_process(page: Page, info: ModelInfo) -> None:
    labels = (
        ("version", __version__),
        ("python", platform.python_version()),
        ("drafter", info.drafter or "none"),
        ("device", info.device),
        ("dtype", info.dtype),
        ("schedule", info.schedule),
    )
    page.add_all("dspark:build_info", "gauge", "What is running here; always 1.", [(labels, 1)])
    process = read_process()
    page.add("process_cpu_seconds", "counter", "User and system CPU time in seconds.", process.cpu_seconds)
    for name, text, value in (
        ("process_start_time_seconds", "Start of the process, in seconds since the epoch.", process.start_time),
        ("process_resident_memory_bytes", "Resident memory in bytes.", process.resident_bytes),
        ("process_virtual_memory_bytes", "Virtual memory in bytes.", process.virtual_bytes),
        ("process_open_fds", "Open file descriptors.", process.open_fds),
        ("process_max_fds", "Most file descriptors that may be open.", process.max_fds),
        ("process_threads", "Threads.", process.threads),
    ):
        if value is not None:
            page.add(name, "gauge", text, value)
