"""The page of metrics: what Prometheus makes of it, whose names it has, who may read it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path

import aiohttp
import pytest

from dspark_stream.errors import ConfigError
from dspark_stream.server.settings import ServerConfig
from fakes import FakeEngine, Script
from wire.harness import Launch, Running, eventually
from wire.raw import connect, post

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "dashboards" / "dspark-stream.json"
SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)\{(?P<labels>.*)\} (?P<value>\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
SUFFIXES = {"gauge": {""}, "counter": {"_total"}, "histogram": {"_bucket", "_sum", "_count"}}


def samples(text: str, *, open_metrics: bool) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """A page read strictly: each family typed once and in one piece, each sample of its family, once, labelled."""
    lines = text.split("\n")
    assert lines.pop() == ""
    if open_metrics:
        assert lines.pop() == "# EOF"
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    families: dict[str, str] = {}
    family = kind = helped = ""
    for line in lines:
        if line.startswith("# HELP "):
            helped = line.split(" ")[2]
            assert len(line.split(" ")) > 3
        elif line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            assert family == helped
            assert family not in families, f"{family} is there twice"
            families[family] = kind
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample is not None, line
            name, labels = sample["name"], LABEL.findall(sample["labels"])
            assert LABEL.sub("", sample["labels"]) == "", line
            total = kind == "counter" and not open_metrics  # the older format names the family with it
            allowed = {""} if total else SUFFIXES[kind]
            assert name in {family + suffix for suffix in allowed}, line
            assert len(dict(labels)) == len(labels), line
            key = name, frozenset(labels)
            assert key not in found, line
            found[key] = float(sample["value"])
    bases = [name.removesuffix("_total") for name in families]
    assert len(set(bases)) == len(bases), "OpenMetrics knows no difference between a name and its total"
    _check_buckets(found)
    return found


def _check_buckets(found: dict[tuple[str, frozenset[tuple[str, str]]], float]) -> None:
    rows: dict[str, list[tuple[float, float]]] = {}
    for (name, labels), value in found.items():
        if name.endswith("_bucket"):
            rows.setdefault(name.removesuffix("_bucket"), []).append((float(dict(labels)["le"]), value))
    for name, row in rows.items():
        counts = [count for _, count in sorted(row)]
        assert counts == sorted(counts), name
        assert max(row)[0] == float("inf")
        assert counts[-1] == value_of(found, f"{name}_count"), name


def value_of(found: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    values = [v for (n, have), v in found.items() if n == name and set(labels.items()) <= have]
    assert len(values) == 1, (name, labels, values)
    return values[0]


async def page(running: Running, accept: str = "", **headers: str) -> str:
    async with running.http() as http, http.get("/metrics", headers={"Accept": accept, **headers}) as answer:
        assert answer.status == 200
        modern = answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        assert modern == ("openmetrics" in accept)
        return await answer.text()


OPEN = "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5"


@pytest.mark.parametrize("accept", ["", OPEN])
async def test_the_page_is_what_prometheus_reads(running: Running, accept: str) -> None:
    """Guards against a page that Prometheus refuses, a name with two types, and names that no board knows."""
    async with running.http() as http:
        for body, status in (({"input": "x"}, 200), ({"input": ""}, 400)):
            async with http.post("/v1/responses", json=body) as answer:
                assert answer.status == status
    async with running.socket() as socket:
        await socket.create()
        await socket.response()
    await eventually(lambda: running.server.service.metrics.loop_lag.count > 0)
    found = samples(await page(running, accept), open_metrics=bool(accept))
    for name, labels in found:
        assert dict(labels)["model_name"] == "fake-135m", name
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert value_of(found, f"dspark:{name}") == 0
    for name in (
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_time_per_output_token_seconds",
        "time_to_first_token_seconds",
    ):
        assert value_of(found, f"dspark:{name}_count") == 2, name
    assert value_of(found, "dspark:request_generation_tokens_sum") == 20
    assert value_of(found, "dspark:request_prompt_tokens_sum") == sum(
        len(request.prompt_ids) for request in running.engine.submitted
    )
    assert value_of(found, "dspark:inter_token_latency_seconds_count") == 14  # ten twice, less the first round's three
    assert value_of(found, "dspark:spec_decode_num_accepted_tokens_per_pos_total", position="0") == 10
    assert value_of(found, "dspark:request_success_total", finished_reason="stop") == 2
    assert value_of(found, "dspark:requests_refused_total", code="empty_input") == 1
    assert value_of(found, "dspark:http_requests_total", method="POST", route="/v1/responses", status="200") == 1
    assert value_of(found, "dspark:websocket_opened_total") == 1
    assert value_of(found, "dspark:websocket_closed_total", code="1000") == 1
    assert value_of(found, "dspark:build_info") == 1
    assert value_of(found, "process_resident_memory_bytes") > 1 << 20
    assert value_of(found, "process_open_fds") > 3
    assert 0 < value_of(found, "process_cpu_seconds_total") < 1e6
    assert running.server.service.started_at - 86_400 < value_of(found, "process_start_time_seconds")
    assert value_of(found, "process_start_time_seconds") <= running.server.service.started_at + 1


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions", "/v1/completions", "socket"])
async def test_gaps_are_counted_where_text_is_sent(launch: Launch, path: str) -> None:
    """Guards against a route whose gaps nobody sees, the wait for the first text counted as one, and streams of one
    socket taken for each other.
    """
    running = await launch(FakeEngine(Script(rounds=(2,)), step_s=0.02))
    metrics = running.server.service.metrics
    gaps, chunks = metrics.inter_chunk_gap, 5 * (2 if path == "socket" else 1)  # ten tokens a stream, two a chunk
    begun = time.monotonic()
    if path == "socket":
        async with running.socket() as socket:
            for lane in ("a", "b"):
                await socket.create(stream_id=lane)
            ends = [await socket.until("response.completed") for _ in range(2)]
        assert all(ends)
    else:
        asked = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"input": "x"}
        asked = {"prompt": "x"} if path == "/v1/completions" else asked
        async with running.http() as http, http.post(path, json={**asked, "stream": True}) as answer:
            assert answer.status == 200
            await answer.read()
    await eventually(lambda: gaps.count + metrics.merged_deltas == chunks - chunks // 5)
    assert 0.015 < gaps.sum < chunks // 5 * (time.monotonic() - begun)
    async with running.http() as http, http.post("/v1/responses", json={"input": "x"}) as answer:
        await answer.read()
    assert gaps.count + metrics.merged_deltas == chunks - chunks // 5  # one body has no chunks


async def test_a_socket_that_closes_is_no_lost_client(running: Running) -> None:
    """Guards against normal closes counted as 499, which an operator reads as clients that gave up."""
    metrics = running.server.service.metrics
    async with running.socket() as socket:
        await socket.create()
        await socket.response()
    async with running.socket() as socket:
        socket.connection.transport.abort()
    await eventually(lambda: metrics.sockets_open == 0 and sum(metrics.http.values()) == 2)
    assert metrics.http == {("GET", "/v1/responses", 101): 2}
    assert sum(metrics.sockets_closed.values()) == 2


async def test_a_client_that_leaves_is_one(running: Running) -> None:
    """Guards against the opposite: a request whose client left, counted as answered."""
    running.engine.gate.clear()
    async with running.http() as http:
        with pytest.raises(TimeoutError):
            async with http.post("/v1/responses", json={"input": "x"}, timeout=aiohttp.ClientTimeout(total=0.2)):
                pass
    metrics = running.server.service.metrics
    await eventually(lambda: sum(metrics.http.values()) == 1)
    assert metrics.http == {("POST", "/v1/responses", 499): 1}


LAST = {
    "/v1/responses": b"event: response.completed",
    "/v1/chat/completions": b"data: [DONE]",
    "/v1/completions": b"data: [DONE]",
}


@pytest.mark.parametrize("route", LAST)
@pytest.mark.parametrize("early", [False, True], ids=["read", "left"])
async def test_a_client_that_has_read_its_events_has_its_answer(running: Running, route: str, early: bool) -> None:
    """Guards against answers counted as lost because their clients close at once; and against the opposite."""
    if early:
        running.engine.gate.clear()
    asked = {"messages": [{"role": "user", "content": "x"}]} if "chat" in route else {"input": "x"}
    asked = {"prompt": "x"} if route == "/v1/completions" else asked
    body = json.dumps({**asked, "stream": True}).encode()
    times = 1 if early else 20
    for _ in range(times):
        async with connect(running) as raw:
            raw.send(post(body, path=route))
            await raw.reader.readuntil(b"\r\n\r\n" if early else LAST[route])
            raw.writer.transport.abort()
    metrics = running.server.service.metrics
    await eventually(lambda: sum(metrics.http.values()) == times)
    assert metrics.http == {("POST", route, 499 if early else 200): times}


async def test_the_dashboard_asks_for_what_is_there(running: Running) -> None:
    """Guards against a panel that stays empty: a metric, or a label of one, that the service does not have."""
    async with running.http() as http:
        for body in ({"input": "x"}, {"input": ""}):
            async with http.post("/v1/responses", json=body) as answer:
                await answer.read()
    found = samples(await page(running), open_metrics=False)
    labels: dict[str, set[str]] = {}
    for name, pairs in found:
        labels.setdefault(name, set()).update(dict(pairs))
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    for query in asked:
        names = re.findall(r"\bdspark:\w+", query)
        assert names
        assert set(names) <= set(labels), query
        for by in re.findall(r"\bby \((\w+)\)", query):
            assert any(by in labels[name] for name in names), query
        assert "model_name" in query  # what a board of several services is sorted by


# --- who may read it --------------------------------------------------------------------------------------------


async def statuses(running: Running, paths: Iterable[str], key: str | None) -> list[int]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    found = []
    async with running.http(headers=headers) as http:
        for path in paths:
            async with http.get(path) as answer:
                found.append(answer.status)
    return found


async def test_a_key_for_the_metrics_opens_them_alone(launch: Launch) -> None:
    """Guards against a scraper that holds the key to the model, and against one whose key opens it."""
    running = await launch(api_key="sekret-1", metrics_key="figures-1")
    paths = ("/metrics", "/v1/models", "/props")
    assert await statuses(running, paths, "figures-1") == [200, 401, 401]
    assert await statuses(running, paths, "sekret-1") == [200, 200, 200]
    assert await statuses(running, paths, "figures-2") == [401, 401, 401]
    assert await statuses(running, paths, None) == [401, 401, 401]
    running = await launch(metrics_key="figures-1")  # on loopback, where the API needs none
    assert await statuses(running, paths, None) == [401, 200, 200]
    assert await statuses(running, paths, "figures-1") == [200, 200, 200]


async def test_metrics_can_be_open_by_choice(launch: Launch) -> None:
    """Guards against a Prometheus that no setting lets in, and against a choice that opens more than the figures."""
    running = await launch(host="0.0.0.0", api_key="sekret-1", open_metrics=True)
    assert await statuses(running, ("/metrics", "/v1/models", "/props"), None) == [200, 401, 401]
    await page(running, Host="dspark:8000")  # as a compose network calls it


def test_a_metrics_key_is_another_one() -> None:
    """Guards against one secret for both."""
    with pytest.raises(ConfigError):
        ServerConfig(api_key="k", metrics_key="k")
    with pytest.raises(ConfigError):
        ServerConfig(metrics_key="k\n")
