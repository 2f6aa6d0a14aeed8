"""Programs that people really use, unchanged, each in an environment of its own, against a real model.

`make test-clients` makes the environments (.venv-clients) and runs this; `make test` does not.
"""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m"
REQUESTS = 5


def run(environment: str, program: str, *arguments: object, folder: Path | None = None) -> str:
    """A program of an environment; its output."""
    path = ROOT / ".venv-clients" / environment / "bin" / program
    if not path.exists():
        pytest.fail(f"{path} is missing: `make test-clients` makes it")
    done = subprocess.run(
        [str(path), *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=folder, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def answered(service: str) -> float:
    """Answers of a service that ended by themselves or by their longest length."""
    with urllib.request.urlopen(f"{service}/metrics", timeout=30) as page:
        text = page.read().decode()
    found = re.findall(r'^dspark:request_success_total\{.*finished_reason="(\w+)".*\} (\S+)$', text, re.M)
    return sum(float(count) for reason, count in found if reason in {"stop", "length"})


def script(environment: str, service: str) -> Any:
    """What a script of ours saw with the package of an environment."""
    output = run(environment, "python", Path(__file__).with_name(f"{environment}_script.py"), service)
    return json.loads(output.splitlines()[-1])


def test_openai(service: str) -> None:
    """Guards against answers, seeds, overflows and sockets that the most used package does not understand."""
    found = script("openai", service)
    chat = found["chat"]
    assert (chat["tokens"], chat["streamed_tokens"]) == (12, 8)
    assert chat["text"]
    assert chat["streamed"]
    assert chat["dspark"] == {"seed": 7, "verification": "coupled"}
    assert chat["fingerprint"].startswith("fp_")
    assert found["completions"]["tokens"] == 5
    assert found["responses"]["first"]
    assert found["responses"]["second"]
    code, message = found["responses"]["overflow"]
    assert code == "context_length_exceeded"
    assert "This model's maximum context length is 8192 tokens." in message
    assert found["seeds"] == {"texts": 1}
    socket = found["websocket"]
    assert socket["warm"] == []
    assert all(socket["texts"])
    assert len(socket["texts"]) == 2


def test_langchain(service: str) -> None:
    """Guards against an overflow that LangChain takes for any bad request."""
    found = script("langchain", service)
    for api in ("chat", "responses"):
        assert found[api]["text"]
        assert found[api]["streamed"]
        assert found[api]["overflow"] == "OpenAIContextOverflowError"
    assert found["completions"]


def test_litellm(service: str) -> None:
    """Guards against an overflow after which LiteLLM does not take the model with the longer context."""
    found = script("litellm", service)
    assert found["text"]
    assert found["streamed"]
    assert found["completion"]
    assert found["overflow"] == "ContextWindowExceededError"
    assert found["stayed"] != "from the large one"
    assert found["fell_back"] == "from the large one"


def guidellm(service: str, tokenizer: Path, folder: Path, profile: str, constraint: str, route: str = "") -> Any:
    """The benchmarks of its report."""
    run(
        "guidellm",
        "guidellm",
        *("run", "--backend", f"kind=openai_http,target={service}" + (f",request_format={route}" if route else "")),
        *("--profile", profile, "--constraint", constraint, "--disable-console"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"),
        *("--output", f"kind=json,path={folder / 'report.json'}"),
        folder=folder,
    )
    return json.loads((folder / "report.json").read_text())["benchmarks"]


@pytest.mark.parametrize("route", ["", "/v1/responses", "/v1/completions"])
def test_guidellm(service: str, tokenizer: Path, tmp_path: Path, route: str) -> None:
    """Guards against a benchmark's own fields being refused, or answers of another length than it asked for."""
    before = answered(service)
    concurrent, enough = "kind=concurrent,streams=2", f"kind=max_requests,count={REQUESTS}"
    (benchmark,) = guidellm(service, tokenizer, tmp_path, concurrent, enough, route)
    totals = benchmark["metrics"]["request_totals"]
    # it leaves out a request whose end it hears of after it has decided that it has enough of them
    assert totals["successful"] in (REQUESTS - 1, REQUESTS), totals
    assert (totals["errored"], totals["incomplete"]) == (0, 0), totals
    assert answered(service) - before == REQUESTS
    assert {request["output_metrics"]["text_tokens"] for request in benchmark["requests"]["successful"]} == {16}


def test_guidellm_at_its_defaults(service: str, tokenizer: Path, tmp_path: Path) -> None:
    """Guards against a sweep, whose second stage has 512 requests open at once, that meets refusals or no answer."""
    found = guidellm(service, tokenizer, tmp_path, "kind=sweep,sweep_size=3", "kind=max_duration,seconds=10")
    assert [b["config"]["strategy"]["type_"] for b in found] == ["synchronous", "throughput", "constant"]
    totals = [b["metrics"]["request_totals"] for b in found]
    assert all(t["successful"] and not t["errored"] for t in totals), totals
    assert totals[1]["incomplete"] > 32, totals


@pytest.mark.parametrize("route", ["chat", "responses", "completions"])
@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
def test_aiperf(service: str, tokenizer: Path, tmp_path: Path, route: str, streaming: bool) -> None:
    """Guards against the same with another benchmark."""
    run(
        "aiperf",
        "aiperf",
        *("profile", "--model", MODEL, "--url", service, "--endpoint-type", route, "--tokenizer", tokenizer),
        *("--request-count", REQUESTS, "--concurrency", 2, "--isl", 64, "--osl", 16, "--ui", "none"),
        *("--extra-inputs", "ignore_eos:true", "--extra-inputs", "min_tokens:16"),
        *(["--streaming"] if streaming else []),
        *("--output-artifact-dir", tmp_path),
        folder=tmp_path,
    )
    (report,) = tmp_path.rglob("profile_export_aiperf.json")
    figures = json.loads(report.read_text())
    assert figures["request_count"]["avg"] == REQUESTS
    assert not figures.get("error_summary")
