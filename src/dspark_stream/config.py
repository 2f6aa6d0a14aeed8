"""Settings: resolved once from argv over environment over defaults, then frozen. A leaf.

The fields of `Config` are the only table of settings. Each carries a `Setting` (help, range), and the flags,
the ``DSPARK_*`` variables, the checks and the printed list are all made from it.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from dspark_stream.errors import ConfigError

PREFIX = "DSPARK_"
DEFAULT_MODEL = "qwen2.5-coder-0.5b"
"""One of the names of `models.names`."""
Group = Literal["model", "engine", "service"]
Quant = Literal["none", "int8", "nf4", "w8a8", "w4a8", "w8a16", "w4a16"]


# --- text to value -----------------------------------------------------------------------------------------


def parse_bytes(text: str) -> int:
    """Read a size: ``1GiB``, ``512MiB``, ``2G`` (powers of 1024), ``2GB`` (powers of 1000) or plain bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)", text.strip(), re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"{text!r} is not a size; write 512MiB, 1GiB, 2G, 2GB or a number of bytes")
    decimal = bool(found[4]) and not found[3]
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1000 if decimal else 1024) ** power)


def parse_schedule(text: str) -> str:
    """Check a schedule's name: one of `SCHEDULES`, ``threshold:A`` or ``fixed:N``."""
    kind, colon, number = text.partition(":")
    if text in SCHEDULES:
        return text
    if kind == "fixed" and re.fullmatch(r"\d{1,3}", number) and int(number) <= MAX_FIXED:
        return text
    if kind == "threshold" and colon and re.fullmatch(r"0?\.\d+|[01](\.0*)?", number):
        return text
    raise ValueError(
        f"{text!r} is not a schedule; write {', '.join(SCHEDULES)}, threshold:A with A from 0 to 1, "
        f"or fixed:N with N from 0 to {MAX_FIXED}"
    )


def _parse_bool(text: str) -> bool:
    try:
        return {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}[text.lower()]
    except KeyError:
        raise ValueError(f"{text!r} is not one of on, off") from None


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


def _parse_host(text: str) -> str:
    # As URLs write an IPv6 address; sockets want it bare.
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _parse_path(text: str) -> Path:
    return Path(text).expanduser()


MAX_FIXED = 64
SCHEDULES = ("adaptive", "early-stop", "lagged", "none")
"""Schedules without a number."""


def default_cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """``$XDG_CACHE_HOME/dspark-stream``, or ``~/.cache/dspark-stream``."""
    environ = os.environ if environ is None else environ
    base = environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say that a relative path there is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path(environ.get("HOME") or Path.home()) / ".cache"
    return root / "dspark-stream"


# --- the table ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What the type of a field does not say. ``low`` and ``high`` are both allowed values."""

    help: str
    group: Group
    low: float = -math.inf
    high: float = math.inf
    metavar: str = ""
    parse: Callable[[str], Any] | None = None
    also_env: str = ""
    """A variable without our prefix that is read after ours."""
    secret: bool = False
    flag: str = ""
    """The flag, where it is not the field's name."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting of the program. Made by `resolve`; tests may make one directly."""

    model: Annotated[
        str,
        Setting(
            "target: a name (dspark-stream models lists them; fetched once), a folder, a .gguf file or a hub name",
            "model",
            metavar="MODEL",
        ),
    ] = DEFAULT_MODEL
    drafter: Annotated[
        str,
        Setting(
            'drafter: "auto" (the one shipped for the model, if any), "none", a folder or a hub name',
            "model",
            metavar="DRAFTER",
        ),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Setting("where the models run", "model")] = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Setting("precision of the models", "model")] = (
        "auto"
    )
    calibration: Annotated[
        Literal["auto", "none"],
        Setting("auto: the calibration of confidences beside the drafter's weights, where there is one", "model"),
    ] = "auto"
    draft_quant: Annotated[
        Quant,
        Setting(
            "quantisation of the drafter's linear layers: int8 and nf4 by bitsandbytes, w8a8 and w4a8 on the CPU's "
            "integer kernels (none is w4a8 there), w8a16 and w4a16 on our kernel for GPUs, with an 8-bit LM head",
            "model",
        ),
    ] = "none"
    target_quant: Annotated[
        Quant,
        Setting("quantisation of the target's linear layers; a GGUF file has its own", "model"),
    ] = "none"
    cpu_kernels: Annotated[
        Literal["auto", "amx", "avx512", "avx2", "portable", "off"],
        Setting("integer kernels for GGUF targets on a CPU: the best that it can run, one by name, or torch", "model"),
    ] = "auto"
    cuda_graphs: Annotated[
        Literal["auto", "off"],
        Setting(
            "auto: on a GPU every decoding round is one captured graph; off: rounds run operation by operation", "model"
        ),
    ] = "auto"
    threads: Annotated[int, Setting("CPU threads of the engine; 0 leaves the choice to torch", "model", 0, 1024)] = 0
    cache_dir: Annotated[
        Path,
        Setting(
            "folder for fetched models and measured curves (default: $XDG_CACHE_HOME/dspark-stream "
            "or ~/.cache/dspark-stream)",
            "model",
            metavar="FOLDER",
            parse=_parse_path,
        ),
    ] = msgspec.field(default_factory=default_cache_dir)

    schedule: Annotated[
        str,
        Setting(
            "what is drafted and verified: adaptive (chosen each round from confidence and load), early-stop (the "
            "paper's Algorithm 1), lagged (its production variant, a budget from confidences two rounds old), "
            "threshold:A (prefix survival of at least A), fixed:N, or none",
            "engine",
            metavar="adaptive|early-stop|lagged|threshold:A|fixed:N|none",
            parse=parse_schedule,
        ),
    ] = "adaptive"
    lookup: Annotated[
        bool,
        Setting(
            "drafts that are looked up in a stream's own prompt and text where it repeats itself, beside the drafter's "
            "or without one; under the adaptive schedule, not in captured rounds",
            "engine",
        ),
    ] = True
    kv_memory: Annotated[
        int,
        Setting(
            "memory for KV and context features, as 512MiB, 1GiB or 2G",
            "engine",
            1 << 20,
            1 << 50,
            metavar="SIZE",
            parse=parse_bytes,
        ),
    ] = 1 << 30
    max_num_seqs: Annotated[int, Setting("most streams that decode at once", "engine", 1, 4096)] = 32
    max_model_len: Annotated[
        int,
        Setting("most tokens of prompt and answer together; 0: the model's own limit", "engine", 0, 1 << 24),
    ] = 0
    prefill_budget_ms: Annotated[
        float,
        Setting("longest that new prompts may delay running streams, each round", "engine", 1, 60_000),
    ] = 60.0

    max_chunk_gap_ms: Annotated[
        float,
        Setting(
            "longest between two chunks of a stream, kept when possible; 0: no bound. Requests may ask for their own",
            "engine",
            0,
            600_000,
        ),
    ] = 0.0

    host: Annotated[
        str,
        Setting(
            "address to listen on; any but a loopback address needs --api-key or --api-key-file",
            "service",
            metavar="HOST",
            parse=_parse_host,
            also_env="HOST",
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Setting("port to listen on; 0 takes a free one", "service", 0, 65535, also_env="PORT")] = 8000
    api_key: Annotated[
        str,
        Setting(
            "key that clients must show (better as DSPARK_API_KEY: flags are visible to other users)",
            "service",
            metavar="KEY",
            secret=True,
        ),
    ] = ""
    api_key_file: Annotated[
        Path | None,
        Setting(
            "further keys, one a line as KEY or LABEL:KEY, with max_streams=N behind it where one has a limit of its "
            "own; read again when it changes",
            "service",
            metavar="FILE",
            parse=_parse_path,
        ),
    ] = None
    metrics_key: Annotated[
        str,
        Setting(
            "key that opens /metrics and nothing else (better as DSPARK_METRICS_KEY)",
            "service",
            metavar="KEY",
            secret=True,
        ),
    ] = ""
    open_metrics: Annotated[
        bool, Setting("on: /metrics is read without a key; it tells figures, no texts", "service")
    ] = False
    allowed_host: Annotated[
        tuple[str, ...],
        Setting("further Host header to accept; may be repeated", "service", metavar="NAME[:PORT]"),
    ] = ()
    allowed_origin: Annotated[
        tuple[str, ...],
        Setting("further web page Origin to accept; may be repeated", "service", metavar="ORIGIN"),
    ] = ()
    served_model_name: Annotated[
        tuple[str, ...],
        Setting(
            "further name under which clients may ask for the model; may be repeated",
            "service",
            metavar="NAME",
        ),
    ] = ()
    allow_control_tokens: Annotated[
        bool,
        Setting(
            "whether the name of a control token in a message is that token, so that clients can end a turn; else it "
            "is plain text",
            "service",
        ),
    ] = False
    max_queue: Annotated[
        int, Setting("most streams that wait for a place; past it clients get 503", "service", 0, 1_000_000)
    ] = 2048
    queue_memory: Annotated[
        int,
        Setting(
            "memory for requests, those that wait and those that are answered, half of it for a client alone; past it "
            "503, 429. A request takes at least 48 KiB, so a small value shortens the queue; messages on sockets whose "
            "end has not come are not counted",
            "service",
            64 << 20,
            1 << 50,
            metavar="SIZE",
            parse=parse_bytes,
        ),
    ] = 512 << 20
    max_streams_per_client: Annotated[
        int,
        Setting(
            "most streams of one key or address, running and waiting; past it 429. 0: a fair share of all places "
            "(max_num_seqs + max_queue), half of them while there is no other client; as many as all places: no "
            "shares, for load tests from one address",
            "service",
            0,
            1_000_000,
        ),
    ] = 0
    max_connections: Annotated[
        int,
        Setting(
            "most connections; past it the longest idle one is closed for the newest, and if all are in use only "
            "/health and /ready are answered",
            "service",
            1,
            1_000_000,
        ),
    ] = 4096
    max_connections_per_address: Annotated[
        int,
        Setting(
            "most connections of one address (IPv6: of one /64 network); behind a proxy all have the proxy's",
            "service",
            1,
            1_000_000,
        ),
    ] = 2048
    max_sockets: Annotated[
        int, Setting("most open WebSockets, half of them for a client alone; past it 503, 429", "service", 1, 1_000_000)
    ] = 1024
    head_timeout_s: Annotated[
        float,
        Setting(
            "seconds in which a request's head must arrive, from connecting or from its first byte",
            "service",
            0.1,
            3600,
            metavar="SECONDS",
            flag="--head-timeout",
        ),
    ] = 10.0
    body_timeout_s: Annotated[
        float,
        Setting(
            "seconds in which a request's body must arrive",
            "service",
            0.1,
            3600,
            metavar="SECONDS",
            flag="--body-timeout",
        ),
    ] = 30.0
    keep_alive_timeout_s: Annotated[
        float,
        Setting(
            "seconds that a connection may wait for its next request; more than the proxy before it keeps them",
            "service",
            0.1,
            86_400,
            metavar="SECONDS",
            flag="--keep-alive-timeout",
        ),
    ] = 75.0
    slow_reader_bytes: Annotated[
        int,
        Setting(
            "unsent bytes of one client, past which its streams pause until it reads again",
            "service",
            1 << 10,
            1 << 40,
            metavar="SIZE",
            parse=parse_bytes,
        ),
    ] = 64 << 10
    slow_reader_timeout_s: Annotated[
        float,
        Setting(
            "seconds after which a client that does not read is given up",
            "service",
            0.1,
            86_400,
            metavar="SECONDS",
            flag="--slow-reader-timeout",
        ),
    ] = 20.0
    shutdown_timeout_s: Annotated[
        float,
        Setting(
            "after SIGTERM, seconds that running streams get to finish",
            "service",
            0,
            86_400,
            metavar="SECONDS",
            flag="--shutdown-timeout",
        ),
    ] = 30.0
    exit_on_engine_failure: Annotated[
        bool,
        Setting(
            "whether the process ends, with exit code 1, when its engine has failed for good, so that whoever "
            "supervises it starts another; else it stays, refuses, and fails its probes",
            "service",
        ),
    ] = True
    access_log: Annotated[
        bool, Setting("one line in the log for every request: figures, no prompt and no key", "service")
    ] = True
    log_format: Annotated[
        Literal["text", "json"], Setting("lines for people, or one JSON object a line", "service")
    ] = "text"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Setting("what is told at least", "service")] = (
        "info"
    )


SPECULATIVE_CONFIG = "speculative_config"
_SPECULATIVE = Setting(
    "drafter, quantisation and schedule in vLLM's manner, as JSON: "
    '{"method": "dspark", "model": DRAFTER, "quantization": "int8", "num_speculative_tokens": N}',
    "engine",
    metavar="JSON",
)


@dataclass(frozen=True)
class _Entry:
    """One row of the table, with what is read from the field's type."""

    name: str
    setting: Setting
    parse: Callable[[str], Any]
    choices: tuple[str, ...] = ()
    repeatable: bool = False

    @property
    def shown_choices(self) -> tuple[str, ...]:
        return ("on", "off") if self.parse is _parse_bool else self.choices

    @property
    def flag(self) -> str:
        return self.setting.flag or "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.flag.removeprefix("--").replace("-", "_").upper()

    def read(self, source: str, texts: Sequence[str]) -> Any:
        """Turn the text of a flag or variable into a value in range, or say what is wrong with it."""
        try:
            values = [self.parse(text) for text in texts]
        except ValueError as error:
            raise ConfigError(f"{source}: {error}", param=self.name) from None
        for value in values:
            if self.choices and value not in self.choices:
                raise ConfigError(f"{source}: {value!r} is not one of {', '.join(self.choices)}", param=self.name)
            low, high = self.setting.low, self.setting.high
            if isinstance(value, int | float) and not low <= value <= high:  # a bool has no limits
                shown, least, most = (_shown(self, number) for number in (value, low, high))
                raise ConfigError(f"{source}: {shown} is out of range, {least} to {most} is allowed", param=self.name)
        return tuple(values) if self.repeatable else values[-1]


@cache
def _table() -> dict[str, _Entry]:
    hints = typing.get_type_hints(Config, include_extras=True)
    entries = [_Entry(SPECULATIVE_CONFIG, _SPECULATIVE, str)]
    for name in Config.__struct_fields__:
        kind, setting = typing.get_args(hints[name])
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        repeatable = typing.get_origin(kind) is tuple
        parse = setting.parse or {bool: _parse_bool, int: _parse_int, float: _parse_float}.get(kind, str)
        entries.append(_Entry(name, setting, parse, choices, repeatable))
    return {entry.name: entry for entry in entries}


# --- flags -------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, groups: Iterable[Group]) -> None:
    """Add the flags of ``groups``. Values stay text until `resolve`, which can then name flag and limit."""
    defaults = Config()
    titles = {"model": "models", "engine": "decoding engine", "service": "service"}
    for group in groups:
        section = parser.add_argument_group(titles[group])
        for entry in _table().values():
            if entry.setting.group != group:
                continue
            help_text = (entry.setting.help + _default_note(entry, defaults)).replace("%", "%%")
            section.add_argument(
                entry.flag,
                dest=entry.name,
                action="append" if entry.repeatable else "store",
                default=None,
                metavar=entry.setting.metavar
                or ("{" + ",".join(entry.shown_choices) + "}" if entry.shown_choices else "N"),
                help=help_text,
            )


def _default_note(entry: _Entry, defaults: Config) -> str:
    value = getattr(defaults, entry.name, "")
    if entry.name == "cache_dir" or value in ("", (), None):
        return f" [{entry.variable}]"
    return f" (default: {_shown(entry, value)}) [{entry.variable}]"


# --- resolving ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """The settings, and for each that is not a default, the flag or variable that it came from."""

    config: Config
    sources: dict[str, str]

    def lines(self) -> Iterator[str]:
        """One line a setting, for the start of the program; secrets masked."""
        width = max(map(len, Config.__struct_fields__))
        for name in Config.__struct_fields__:
            source = f"  ({self.sources[name]})" if name in self.sources else ""
            value = getattr(self.config, name)
            yield f"  {name:<{width}}  {_shown(_table()[name], value) or '-'}{source}"


def resolve(flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Resolved:
    """Make the `Config`: flags over environment over defaults.

    Args:
        flags: What argparse read for `add_arguments` (other names and None are ignored).
        environ: The environment; ``os.environ`` when not given.

    Raises:
        ConfigError: an unknown ``DSPARK_*`` variable, a wrong type, a value out of range, two flags that
            contradict each other. The message names the flag or variable, the value and the limit.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {"cache_dir": default_cache_dir(environ)}
    sources: dict[str, str] = {}
    for layer in (_from_environment(environ), _from_flags(flags or {})):
        for name, (source, value) in layer.items():
            values[name], sources[name] = value, source
    return Resolved(Config(**values), sources)


_Layer = dict[str, tuple[str, Any]]


def _from_environment(environ: Mapping[str, str]) -> _Layer:
    known = {entry.variable for entry in _table().values()}
    for variable in environ:
        if variable.startswith(PREFIX) and variable not in known:
            close = difflib.get_close_matches(variable, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{variable}: there is no such setting{hint}", param=variable)
    layer: _Layer = {}
    for entry in _table().values():
        for variable in (entry.setting.also_env, entry.variable):
            # An empty variable counts as not set: compose files and CI systems cannot leave one out.
            text = environ.get(variable, "").strip() if variable else ""
            if text:
                texts = [part.strip() for part in text.split(",")] if entry.repeatable else [text]
                layer[entry.name] = (variable, entry.read(variable, texts))
    return _with_speculative_config(layer)


def _from_flags(flags: Mapping[str, Any]) -> _Layer:
    layer: _Layer = {}
    for entry in _table().values():
        given = flags.get(entry.name)
        if given is not None:
            texts = given if entry.repeatable else [given]
            layer[entry.name] = (entry.flag, entry.read(entry.flag, texts))
    return _with_speculative_config(layer)


class _SpeculativeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    method: Literal["dspark"] = "dspark"
    model: str | None = None
    quantization: Quant | None = None
    num_speculative_tokens: Annotated[int, msgspec.Meta(ge=0, le=MAX_FIXED)] | None = None


def _with_speculative_config(layer: _Layer) -> _Layer:
    """Replace ``speculative_config`` by the settings that it stands for."""
    if SPECULATIVE_CONFIG not in layer:
        return layer
    source, text = layer.pop(SPECULATIVE_CONFIG)
    try:
        given = msgspec.json.decode(text, type=_SpeculativeConfig)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{source}: {error}", param=SPECULATIVE_CONFIG) from None
    count = given.num_speculative_tokens
    stands_for = {
        "drafter": given.model,
        "draft_quant": given.quantization,
        "schedule": None if count is None else f"fixed:{count}",
    }
    for name, value in stands_for.items():
        if value is None:
            continue
        if name in layer and layer[name][1] != value:
            raise ConfigError(
                f"{layer[name][0]} says {layer[name][1]}, but {source} says {value}; give one of the two",
                param=name,
            )
        layer[name] = (source, value)
    return layer


def _shown(entry: _Entry, value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if entry.setting.secret:
        return "****" if value else ""
    if entry.setting.parse is parse_bytes and isinstance(value, int):
        for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
            if value % 1024**power == 0:
                return f"{value // 1024**power}{unit}"
        return f"{value} bytes"
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:.10g}" if isinstance(value, float) else str(value)
