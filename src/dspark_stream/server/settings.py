"""Settings of the service, frozen; the program's own settings are mapped onto these in one place (the cli)."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import msgspec

from dspark_stream.errors import ConfigError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where the service listens, who may use it, and the bounds of everything that a client can make it hold."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one; `serve` reports which."""
    api_key: str = ""
    """Empty: no key is asked for, which only a loopback bind allows."""
    api_key_file: Path | None = None
    """Further keys, one a line (see `keys.read_keys`); read again when it changes."""
    key_poll_s: float = 2.0
    """How soon that counts."""
    metrics_key: str = ""
    """Opens ``/metrics`` and nothing else, beside the keys of the API."""
    open_metrics: bool = False
    """``/metrics`` without a key."""
    access_log: bool = True
    """One line a request."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names to accept beside the bind's own, as ``name`` (any port) or ``name:port``; ``*`` is any."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins to accept beside the page's own, exactly as browsers send them."""
    served_names: tuple[str, ...] = ()
    """Further names under which clients may ask for the model."""
    web_dir: Path | None = None
    """Folder of the demo page; None serves no page."""

    max_queue: int = 2048
    """Streams that may wait beyond the engine's ``max_num_seqs``; past it 503."""
    queue_memory: int = 512 << 20
    """Bytes of what clients have sent and of the streams that it became; past it 503, past a client's share 429."""
    max_streams_per_client: int = 0
    """0: a fair share of all places, half of them for a client alone (`Admission`)."""
    max_sockets: int = 1024
    max_connections: int = 4096
    """In all; fewer where the process may not have so many files open."""
    max_connections_per_address: int = 2048
    max_message_bytes: int = 1 << 20
    """Longest message on a socket and longest HTTP body."""
    max_lanes: int = 64
    """Lanes of one socket that are in use at once."""
    max_lane_queue: int = 8
    """Responses that may wait in one lane behind the running one."""
    max_socket_queue: int = 128
    """Responses, running and waiting, of one socket."""
    tokenizer_threads: int = 2
    """And one more for long prompts."""

    default_max_output_tokens: int = 1024
    """For a request that does not say; less where the context has less room."""
    store_max_responses: int = 1024
    store_max_bytes: int = 64 << 20

    pending_limit_bytes: int = 64 << 10
    """Unsent events of one client, past which its streams leave the batch until it reads again."""
    write_buffer_bytes: int = 64 << 10
    """What may lie in a transport before a write waits for the reader."""
    send_buffer_bytes: int = 128 << 10
    """The kernel's share of the same: left to itself it takes megabytes, and a stalled reader is noticed late."""
    slow_reader_timeout_s: float = 20.0
    """How long one write may wait, or streams may be held, before the reader is given up."""
    heartbeat_s: float = 30.0
    """Between pings on a silent socket, and between comments on a silent event stream."""
    head_timeout_s: float = 10.0
    """From connecting to a request's first byte, and from there to the end of its head."""
    body_timeout_s: float = 30.0
    """For the whole of a request's body, from its head on."""
    keep_alive_timeout_s: float = 75.0
    """Between an answer and the next request of a connection."""
    shutdown_timeout_s: float = 30.0
    exit_on_engine_failure: bool = True
    """Whether `serve` ends when the engine has failed: whoever supervises the process then starts another."""
    close_timeout_s: float = 2.0
    """How long a closing socket waits for the peer's close frame."""

    def __post_init__(self) -> None:
        if not self.is_loopback and not self.api_key and self.api_key_file is None:
            raise ConfigError(
                f"listening on {self.host} needs a key: anybody who reaches it could use the model", param="api_key"
            )
        for name in ("api_key", "metrics_key"):
            key = getattr(self, name)
            if key and not (key.isascii() and key.isprintable()):
                raise ConfigError("the key must be printable ASCII: it travels in headers", param=name)
        if self.metrics_key and self.metrics_key == self.api_key:
            raise ConfigError("the metrics' key must be another one than the API's", param="metrics_key")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0", param=name)
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be below 0", param=name)
        for origin in self.allowed_origins:
            if "://" not in origin or origin.endswith("/"):
                raise ConfigError(
                    f"{origin!r} is not an origin; write scheme://host[:port] without a path", param="allowed_origins"
                )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the bind."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


_POSITIVE = (
    "queue_memory",
    "max_sockets",
    "max_connections",
    "max_connections_per_address",
    "max_message_bytes",
    "max_lanes",
    "max_socket_queue",
    "tokenizer_threads",
    "default_max_output_tokens",
    "key_poll_s",
    "pending_limit_bytes",
    "write_buffer_bytes",
    "send_buffer_bytes",
    "slow_reader_timeout_s",
    "heartbeat_s",
    "head_timeout_s",
    "body_timeout_s",
    "keep_alive_timeout_s",
    "close_timeout_s",
)
_NOT_NEGATIVE = (
    "port",
    "max_queue",
    "max_streams_per_client",
    "max_lane_queue",
    "store_max_responses",
    "store_max_bytes",
    "shutdown_timeout_s",
)
