"""Files of deploy/ and for containers name settings, paths and files that there are."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from dspark_stream import config as settings
from dspark_stream.server.guard import OPEN_PATHS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "deploy").iterdir(), ROOT / "Dockerfile", ROOT / "compose.yaml"])
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
VARIABLE = re.compile(r"\bDSPARK_[A-Z_]+\b")
# Those of pip, apt, useradd, docker and Docker's own instructions.
FOREIGN = {
    "--build", "--build-arg", "--bundle", "--from", "--home-dir", "--index-url", "--interval", "--no-create-home",
    "--no-install-recommends", "--now", "--retries", "--start-period", "--timeout", "--uid",
}  # fmt: skip


def known_flags() -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    settings.add_arguments(parser, ("model", "engine", "service"))
    return {flag for action in parser._actions for flag in action.option_strings}


def known_variables() -> set[str]:
    return {"DSPARK_" + flag.removeprefix("--").replace("-", "_").upper() for flag in known_flags()}


def unknown(text: str) -> list[str]:
    flags = set(FLAG.findall(text)) - known_flags() - FOREIGN
    return sorted(flags | set(VARIABLE.findall(text)) - known_variables())


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "api-keys"], ids=lambda path: path.name)
def test_settings_that_are_named_exist(path):
    assert unknown(path.read_text()) == []


def test_the_rule_sees_settings_that_do_not_exist():
    assert unknown("serve --api-key-file f --shutdown-timeuot 3 DSPARK_HOST=h DSPARK_HOTS=h") == [
        "--shutdown-timeuot",
        "DSPARK_HOTS",
    ]
    assert not FOREIGN & known_flags()


def test_the_health_check_asks_a_path_that_needs_no_key():
    check = (ROOT / "Dockerfile").read_text().partition("HEALTHCHECK")[2]
    assert re.findall(r"\}(/[a-z]+)'", check)[0] in OPEN_PATHS


def test_the_image_is_built_from_files_that_are_there():
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    names = [name for line in copied for name in line.split()]
    assert {"src", "kernels", "web"} <= set(names)
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().split("\n") if line.startswith("!")}
    assert set(names) == let_in
    assert all((ROOT / name).exists() for name in names)


def seconds(pattern: str, name: str) -> float:
    found = re.search(pattern, (ROOT / name).read_text())
    assert found, f"{name} has nothing like {pattern}"
    return float(found[1])


@pytest.mark.parametrize(
    ("name", "flag", "stop"),
    [
        ("deploy/dspark-stream.service", r"--shutdown-timeout (\d+)", r"TimeoutStopSec=(\d+)"),
        ("compose.yaml", r'--shutdown-timeout", "(\d+)"', r"stop_grace_period: (\d+)s"),
    ],
)
def test_a_drain_is_not_cut_short(name, flag, stop):
    assert seconds(stop, name) > seconds(flag, name) + 30  # a step that does not end is left alone so long


@pytest.mark.parametrize(
    ("name", "kept"), [("nginx.conf", r"keepalive_timeout (\d+)s"), ("Caddyfile", r"keepalive (\d+)s")]
)
def test_proxies_give_connections_up_before_the_service_does(name, kept):
    assert seconds(kept, f"deploy/{name}") < settings.Config().keep_alive_timeout_s


def test_compose_and_prometheus_agree():
    yaml = pytest.importorskip("yaml")  # comes with transformers
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    services = compose["services"]
    (job,) = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert target.partition(":")[0] in services
    secret = Path(job["authorization"]["credentials_file"]).name
    assert secret in services["prometheus"]["secrets"]
    assert compose["secrets"][secret]["environment"] in services["dspark"]["environment"]
    assert all(name in compose["secrets"] for service in services.values() for name in service["secrets"])
