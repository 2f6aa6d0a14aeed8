"""Files of deploy/ and for containers name settings, paths and files that there are."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dspark_stream import config as settings
from dspark_stream.server.guard import OPEN_PATHS

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "dspark-stream.json"
FILES = sorted([*(f for f in (ROOT / "deploy").rglob("*") if f.is_file()), ROOT / "Dockerfile", ROOT / "compose.yaml"])
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
    assert all(name in compose["secrets"] for service in services.values() for name in service.get("secrets", ()))


def accepted(folder: Path, name: str, places: dict[str, str], *command: str) -> str:
    """What a tool says that accepts its file, with what lies elsewhere on a server put into ``folder``."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    text = (ROOT / "deploy" / name).read_text()
    for there, here in places.items():
        assert there in text
        text = text.replace(there, here)
    (folder / name).write_text(text)
    environ = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_systemd_accepts_the_unit(tmp_path):
    """A directive that systemd does not know is one that it does not keep."""
    name = "dspark-stream.service"
    places = {"/opt/dspark-stream/.venv/bin/dspark-stream": shutil.which("true") or "/bin/true"}
    assert name not in accepted(tmp_path, name, places, "systemd-analyze", "verify", f"./{name}")  # it only warns


def test_nginx_accepts_its_file(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=chat.example.org",
         "-keyout", tmp_path / "privkey.pem", "-out", tmp_path / "fullchain.pem"],
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    places = {"/etc/ssl/dspark-stream": str(tmp_path), "http {": f"pid {tmp_path}/pid; error_log stderr;\nhttp {{"}
    accepted(tmp_path, "nginx.conf", places, "nginx", "-t", "-c", str(tmp_path / "nginx.conf"))


def test_caddy_accepts_its_file(tmp_path):
    accepted(tmp_path, "Caddyfile", {}, "caddy", "validate", "--adapter", "caddyfile", "--config", "Caddyfile")


def test_prometheus_accepts_its_file(tmp_path):
    (tmp_path / "key").write_text("key")
    places = {"/run/secrets/dspark_metrics_key": str(tmp_path / "key")}
    accepted(tmp_path, "prometheus.yml", places, "promtool", "check", "config", "prometheus.yml")


# --- Grafana ----------------------------------------------------------------------------------------------------


def test_grafana_finds_its_files_and_prometheus():
    """Guards against a Grafana that starts empty: folders mounted where it does not look, a source that is none."""
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert all((ROOT / folder).is_dir() for folder in mounts)
    provisioning = next(ROOT / here for here, there in mounts.items() if there == "/etc/grafana/provisioning")
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "dspark-stream.yml").read_text())["providers"]
    shown = next(ROOT / here for here, there in mounts.items() if there == provider["options"]["path"])
    assert DASHBOARD.parent == shown
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())
    (source,) = sources["datasources"]
    assert source["url"].removeprefix("http://").partition(":")[0] in services
    (job,) = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    assert source["jsonData"]["timeInterval"] == job["scrape_interval"]
    assert services["grafana"]["ports"] == ["127.0.0.1:3000:3000"]


def queries(dashboard) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def lost(mine, back, at="$") -> list[str]:
    """Paths of what is in ``mine`` and not, or otherwise, in ``back``."""
    if isinstance(mine, dict) and isinstance(back, dict):
        return [p for key, value in mine.items() for p in lost(value, back.get(key), f"{at}.{key}")]
    if isinstance(mine, list) and isinstance(back, list) and len(mine) == len(back):
        return [p for i, (one, two) in enumerate(zip(mine, back, strict=True)) for p in lost(one, two, f"{at}[{i}]")]
    return [] if mine == back else [at]


def test_the_dashboard_has_grafanas_structure():
    """Read and written by Grafana's own classes nothing is lost: no field that they do not know, none otherwise."""
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    mine = json.loads(DASHBOARD.read_text())

    def through(dashboard):
        return json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(dashboard)))

    assert lost(mine, through(mine)) == []
    mine["panels"][0]["options"]["graphmode"] = "area"
    assert lost(mine, through(mine)) == ["$.panels[0].options.graphmode"]


def test_panels_have_names_of_their_own_places_and_words():
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"]["uid"] == "${datasource}"
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        names = {target["legendFormat"] for target in panel["targets"]}
        for override in panel["fieldConfig"]["overrides"]:
            assert override["matcher"]["options"] in names, panel["title"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]+)", DASHBOARD.read_text())) == variables
    wanted = ("Tokens a second", "Accepted length", "Verification length against load", "Time to first token")
    assert {*wanted, "Gaps between chunks", "Streams and queue"} <= {panel["title"] for panel in panels}


def wrong(expressions: list[str], folder: Path) -> str:
    """What PromQL's parser says against them; Prometheus' own where it is installed."""
    expressions = [e.replace("$__rate_interval", "1m").replace("$model", ".*") for e in expressions]
    promtool = shutil.which("promtool")
    if promtool is None:
        parser = pytest.importorskip("promql_parser")
        try:
            for expression in expressions:
                parser.parse(expression)
        except ValueError as error:
            return str(error)
        return ""
    rules = [{"record": f"rule:{i}", "expr": expression} for i, expression in enumerate(expressions)]
    file = folder / "rules.json"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "g", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, timeout=60, check=False)
    return done.stderr if done.returncode else ""


def test_queries_are_promql(tmp_path):
    asked = queries(json.loads(DASHBOARD.read_text()))
    assert len(asked) > 20
    assert wrong(asked, tmp_path) == ""
    assert wrong(["sum (rate(dspark:late_chunks_total[1m])"], tmp_path) != ""
