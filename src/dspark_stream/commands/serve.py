"""``dspark-stream serve``: load the models and serve them until a signal comes."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from dspark_stream import config as settings
from dspark_stream import logs
from dspark_stream.commands import common
from dspark_stream.commands.common import PROGRAM
from dspark_stream.errors import ConfigError
from dspark_stream.stopping import Terminated, stoppable

if TYPE_CHECKING:
    from dspark_stream.config import Config
    from dspark_stream.server.app import Server
    from dspark_stream.server.settings import ServerConfig

log = logging.getLogger(__name__)

_EPILOG = """\
examples:
  dspark-stream serve
      the default model, fetched once, on http://127.0.0.1:8000/
  dspark-stream serve smollm2-135m
      another one that has a name; dspark-stream models lists them
  dspark-stream serve Qwen/Qwen3-4B --drafter deepseek-ai/dspark_qwen3_4b_block7
  dspark-stream serve ./model.gguf --drafter none --port 9000
  DSPARK_API_KEY=... dspark-stream serve --host 0.0.0.0 --allowed-host chat.example.org

Every setting can also be given in the environment, by the name in brackets; flags win. SIGTERM and Ctrl-C let
running answers finish for --shutdown-timeout seconds.
"""


def add(into: common.Subparsers) -> None:
    """Add ``serve`` and its flags."""
    parser = common.add_command(into, "serve", run, "start the service and its demo page", _EPILOG)
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the target model (the same as --model)")
    settings.add_arguments(parser, ("model", "engine", "service"))


def run(args: argparse.Namespace) -> int:
    """Load the models and serve them until a signal comes."""
    flags = vars(args)
    if args.positional_model is not None:
        if args.model not in (None, args.positional_model):
            raise ConfigError(
                f"the model is {args.positional_model!r} and --model says {args.model!r}; give one of the two"
            )
        flags = {**flags, "model": args.positional_model}
    resolved = settings.resolve(flags)
    try:
        with stoppable() as check:
            return _serve_resolved(resolved, check)
    except Terminated:
        print(f"{PROGRAM}: stopped before the service was up", file=sys.stderr)
        return 0


def _serve_resolved(resolved: settings.Resolved, check: Callable[[], None]) -> int:
    from dspark_stream.server.keys import KeyRing

    config = resolved.config
    logs.configure(config.log_format, config.log_level)
    stream = cast(TextIO, logs.LogStream(log)) if config.log_format == "json" else None
    if stream is None:
        print(f"{PROGRAM}: settings", *resolved.lines(), sep="\n", file=sys.stderr, flush=True)
    else:
        log.info("settings", extra={"fields": {"settings": [line.strip() for line in resolved.lines()]}})
    server_config = _server_config(config)
    check_port(config.host, config.port)
    # The service reads it itself; what is wrong with it is to be known before the models are loaded, not after.
    KeyRing(config.api_key, config.api_key_file)
    engine, tokenizer = common.load(config, stream=stream)
    if tokenizer is None:
        raise ConfigError("this model has no tokenizer, so it cannot be served", param="model")

    import uvloop

    from dspark_stream.server import app

    check()
    uvloop.run(app.serve(server_config, engine, tokenizer, ready=_announce))
    return 0


def _announce(server: Server) -> None:
    what = "page" if server.config.web_dir else "service"
    print(f"{PROGRAM}: the {what} is at {server.url}", flush=True)


def _server_config(config: Config) -> ServerConfig:
    from dspark_stream.server.settings import ServerConfig

    return ServerConfig(
        host=config.host,
        port=config.port,
        api_key=config.api_key,
        api_key_file=config.api_key_file,
        metrics_key=config.metrics_key,
        open_metrics=config.open_metrics,
        access_log=config.access_log,
        allowed_hosts=config.allowed_host,
        allowed_origins=config.allowed_origin,
        served_names=config.served_model_name,
        web_dir=_web_dir(),
        max_queue=config.max_queue,
        queue_memory=config.queue_memory,
        max_streams_per_client=config.max_streams_per_client,
        max_connections=config.max_connections,
        max_connections_per_address=config.max_connections_per_address,
        max_sockets=config.max_sockets,
        head_timeout_s=config.head_timeout_s,
        body_timeout_s=config.body_timeout_s,
        keep_alive_timeout_s=config.keep_alive_timeout_s,
        pending_limit_bytes=config.slow_reader_bytes,
        slow_reader_timeout_s=config.slow_reader_timeout_s,
        shutdown_timeout_s=config.shutdown_timeout_s,
        exit_on_engine_failure=config.exit_on_engine_failure,
    )


def _web_dir() -> Path | None:
    """The demo page: in a checkout ``web/`` is a link to the folder beside ``src/``; None where it was left out."""
    folder = Path(__file__).parents[1] / "web"
    return folder if (folder / "index.html").is_file() else None


def check_port(host: str, port: int) -> None:
    """Find out that the port is taken before the models are loaded, not after."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except UnicodeError:  # of a name's encoding: an empty part, or one that is too long
        raise ConfigError(f"cannot listen on {host}: that is no host name", param="host") from None
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}", param="port") from None
