"""What the commands do: here the settings become models, an engine, a service or a client.

Called by `cli` with what argparse read. Heavy imports are made where they are needed, so that mistakes are told
before anything is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

import msgspec

from dspark_stream import __version__, logs
from dspark_stream import config as settings
from dspark_stream.console import printable
from dspark_stream.errors import ConfigError
from dspark_stream.stopping import Terminated, stoppable
from dspark_stream.types import GenerationRequest, ModelInfo, RecommendedSampling, SamplingParams

if TYPE_CHECKING:
    from dspark_stream.config import Config
    from dspark_stream.engine.boundary import Tokenizer
    from dspark_stream.engine.worker import EngineThread
    from dspark_stream.measure.evaluate import Figures, Plan, Prompt
    from dspark_stream.server.app import Server
    from dspark_stream.server.settings import ServerConfig

log = logging.getLogger(__name__)

PROGRAM = "dspark-stream"


# --- what commands share -----------------------------------------------------------------------------------


def _sampling(args: argparse.Namespace, recommended: RecommendedSampling | None = None) -> SamplingParams:
    """As the flags say; each that was not given as ``recommended``, or else greedily."""
    recommended = recommended or RecommendedSampling()
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=_first(args.temperature, recommended.temperature, 0.0),
        top_p=_first(args.top_p, recommended.top_p, 1.0),
        top_k=_first(args.top_k, recommended.top_k, 0),
        min_p=args.min_p,
        seed=args.seed,
        stop=tuple(getattr(args, "stop", ())),
        ignore_eos=args.ignore_eos,
    )


_Value = TypeVar("_Value")


def _first(*values: _Value | None) -> _Value:
    return next(value for value in values if value is not None)


def _load(
    config: Config, *, quiet: bool = False, measure_again: bool = False, stream: TextIO | None = None
) -> tuple[EngineThread, Tokenizer | None]:
    """Load the models and measure the machine, showing on ``stream`` (stderr) how it goes."""
    from dspark_stream.console import Progress

    progress = Progress(stream, enabled=not quiet)
    # Libraries print to stdout as they load; what goes there is ours (text, JSON).
    with stoppable(), contextlib.redirect_stdout(sys.stderr):
        progress.say(f"{PROGRAM} {__version__}: getting ready")
        from dspark_stream.engine.build import build_engine

        return build_engine(config, progress, measure_again=measure_again)


def _quiet(args: argparse.Namespace) -> bool:
    """Whether to show no progress: a script that reads JSON may have put stderr into the same pipe."""
    return bool(args.json) and not sys.stderr.isatty()


# --- serve -------------------------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> int:
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
    _check_port(config.host, config.port)
    # The service reads it itself; what is wrong with it is to be known before the models are loaded, not after.
    KeyRing(config.api_key, config.api_key_file)
    engine, tokenizer = _load(config, stream=stream)
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
    folder = Path(__file__).parent / "web"
    return folder if (folder / "index.html").is_file() else None


def _check_port(host: str, port: int) -> None:
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


# --- chat --------------------------------------------------------------------------------------------------


def chat(args: argparse.Namespace) -> int:
    """Talk to a service; the flags become the client's options."""
    from dspark_stream.client.terminal import ChatOptions
    from dspark_stream.client.terminal import chat as talk

    return talk(
        ChatOptions(
            url=args.url,
            api_key=args.api_key,
            instructions=args.instructions,
            mode="plain" if args.plain else "dspark",
            verification=args.verification,
            origin=args.origin,
            max_output_tokens=args.max_tokens,
            temperature=args.temperature,
            seed=args.seed,
        )
    )


# --- generate ----------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> int:
    """Answer one prompt; text or JSON on stdout, figures on stderr."""
    from dspark_stream.engine.local import LocalEngine
    from dspark_stream.generate import generate as run

    if "" in args.stop:
        raise ConfigError("--stop: an empty text would end every answer at once")
    engine, tokenizer = _load(settings.resolve(vars(args)).config, quiet=_quiet(args))
    request = GenerationRequest(
        request_id="generate",
        prompt_ids=_prompt_ids(args, tokenizer),
        sampling=_sampling(args, engine.info.sampling),
        mode=args.mode,
        verification=args.verification,
        record_rounds=True,
    )
    with LocalEngine(engine) as local:
        answer = run(local, request, None if args.json else _print_text)
    if args.json:
        print(json.dumps(msgspec.to_builtins(answer)))
        return 0
    print()
    speed = "" if answer.tokens_per_s is None else f", {answer.tokens_per_s:.1f} tokens/s"
    length = "" if answer.accepted_length is None else f", accepted length {answer.accepted_length:.2f}"
    drafts = args.mode == "dspark" and engine.info.gamma and engine.info.schedule == "adaptive"
    if drafts and answer.rounds and not any(r.draft_tokens for r in answer.rounds):
        length = ", nothing drafted since it did not seem to pay (--schedule fixed:3 drafts all the same)"
    print(
        f"[{len(answer.output_ids)} tokens in {len(answer.rounds)} rounds{speed}{length}, "
        f"ended by {answer.finish_reason}]",
        file=sys.stderr,
    )
    return 0


def _prompt_ids(args: argparse.Namespace, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if args.input_ids is not None:
        ids: tuple[int, ...] = args.input_ids
        return ids
    if tokenizer is None:
        raise ConfigError("this model has no tokenizer, so --prompt cannot be read; give --input-ids 1,2,3")
    return tuple(tokenizer.encode_chat([("user", args.prompt)]))


def _print_text(text: str) -> None:
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


# --- models ------------------------------------------------------------------------------------------------


def models(args: argparse.Namespace) -> int:
    """List the models that have a name; a table or JSON on stdout. Nothing is fetched or loaded."""
    from dspark_stream.drafters import shipped_drafter
    from dspark_stream.models.fetch import arrived_bytes, find_model
    from dspark_stream.models.names import MODELS

    cache_dir = settings.resolve({"cache_dir": args.cache_dir}).config.cache_dir
    listed = []
    for model in MODELS.values():
        path, drafter = find_model(model, cache_dir), shipped_drafter(model.name)
        listed.append(
            {
                "name": model.name,
                "title": model.title,
                "default": model.name == settings.DEFAULT_MODEL,
                "file": model.file_name,
                "bytes": model.size,
                "sha256": model.sha256,
                "parameters": model.parameters,
                "licence": model.licence,
                "note": model.note,
                "drafter": drafter.name if drafter else None,
                "sampling": msgspec.to_builtins(model.sampling),
                "path": str(path) if path else None,
                "arrived_bytes": model.size if path else arrived_bytes(model, cache_dir),
            }
        )
    print(json.dumps({"models": listed}) if args.json else "\n\n".join(map(_shown_model, listed)))
    return 0


def _shown_model(one: dict[str, Any]) -> str:
    sampling = ", ".join(f"{name.replace('_', '-')} {v:g}" for name, v in one["sampling"].items() if v is not None)
    arrived = one["arrived_bytes"] // 1_000_000
    lines = {
        "model": f"{one['title']}, {one['parameters']}" + (f"; {one['note']}" if one["note"] else ""),
        "licence": one["licence"],
        "drafter": one["drafter"] or "none: decoding is plain",
        "sampling": sampling or "nothing is recommended",
        "fetched": one["path"] or (f"{arrived} MB of it" if arrived else "no"),
    }
    head = f"{one['name']}  {one['bytes'] / 1e6:,.0f} MB" + (" (default)" if one["default"] else "")
    return "\n".join([head, *(f"  {what:<9} {text}" for what, text in lines.items())])


# --- eval --------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> int:
    """Measure a pair on prompt files; a table or JSON on stdout."""
    from dspark_stream.measure.evaluate import Plan, labels, parts_table, quantisation_cost, read_prompts, table

    config = settings.resolve(vars(args)).config
    if args.streams > config.max_num_seqs:
        config = msgspec.structs.replace(config, max_num_seqs=args.streams)
    files = {str(path): read_prompts(path, args.limit) for path in args.prompts}
    plan = Plan(
        sampling=_sampling(args),
        mode=args.mode,
        verification=args.verification,
        streams=args.streams,
        turns=args.turns,
    )
    figures, together, info = _measure(config, files, plan, quiet=_quiet(args))
    unquantised = None
    if (config.draft_quant, config.target_quant) != ("none", "none") and not args.no_quant_cost:
        gc.collect()
        bare = msgspec.structs.replace(config, draft_quant="none", target_quant="none", cpu_kernels="off")
        unquantised = _measure(bare, files, plan, quiet=_quiet(args))[1]
    if args.json:
        report = {"files": figures, "all": together, "unquantised": unquantised, "engine": info, "plan": plan}
        print(json.dumps(msgspec.to_builtins(report)))
        return 0
    several = len(figures) > 1
    rows = dict(zip(labels([Path(name) for name in figures]), figures.values(), strict=True)) if several else {}
    rows["all"] = together
    if unquantised is not None:
        rows["all, unquantised"] = unquantised
    print(table(rows))
    if parts := parts_table(together):
        print(parts)
    if unquantised is not None:
        print(quantisation_cost(together, unquantised))
    return 0


def _measure(
    config: Config, files: dict[str, list[Prompt]], plan: Plan, *, quiet: bool
) -> tuple[dict[str, Figures], Figures, ModelInfo]:
    """Load the pair, run all files, and give its memory back."""
    from dspark_stream.console import Progress
    from dspark_stream.engine.local import LocalEngine
    from dspark_stream.measure.evaluate import evaluate as run

    engine, tokenizer = _load(config, quiet=quiet)
    if tokenizer is None:
        raise ConfigError("this model has no tokenizer, so prompt files cannot be read")
    with LocalEngine(engine) as local:
        figures, together = run(local, tokenizer, files, plan, Progress(enabled=not quiet))
    return figures, together, engine.info


# --- calibrate -----------------------------------------------------------------------------------------------


def calibrate(args: argparse.Namespace) -> int:
    """Fit a calibration, write it beside the drafter, and show what it does."""
    from dspark_stream.console import Progress
    from dspark_stream.decoding.calibration import save_calibration
    from dspark_stream.engine.build import drafter_folder
    from dspark_stream.engine.local import LocalEngine
    from dspark_stream.measure.calibrate import calibrate as run
    from dspark_stream.measure.calibrate import calibration_config, table
    from dspark_stream.measure.evaluate import read_prompts
    from dspark_stream.models.checkpoint import read_config
    from dspark_stream.training.answers import read_answers

    files = [read_prompts(path, None if args.unseen_by else args.limit) for path in args.prompts]
    config = settings.resolve(vars(args)).config
    folder = drafter_folder(config)
    if folder is None:
        raise ConfigError("there is no drafter to calibrate: name one with --drafter", param="drafter")
    if not read_config(folder).enable_confidence_head:
        raise ConfigError(f"{folder} has no confidence head, so there is nothing to calibrate", param="drafter")
    out: Path = args.out or folder
    if not out.is_dir():
        raise ConfigError(f"{out} is no folder", param="out")
    engine, tokenizer = _load(calibration_config(config), quiet=_quiet(args))
    if tokenizer is None:
        raise ConfigError("this model has no tokenizer, so prompt files cannot be read")
    progress = Progress(enabled=not _quiet(args))
    seen: set[tuple[int, ...]] = set()
    if args.unseen_by:
        seen = {a.prompt_ids for a in read_answers(args.unseen_by, engine.info.vocab_size)}
    prompts: list[tuple[int, ...]] = []
    for path, asked in zip(args.prompts, files, strict=True):
        ids = [tuple(tokenizer.encode_chat([(m.role, m.content) for m in p.messages])) for p in asked]
        unseen = [i for i in ids if i not in seen]
        if args.unseen_by:
            progress.say(f"{path}: {len(ids) - len(unseen)} of {len(ids)} prompts are in {args.unseen_by}")
        prompts += unseen[: args.limit]
    if not prompts:
        raise ConfigError(f"every prompt is in {args.unseen_by}: none is left to calibrate with", param="unseen_by")
    with LocalEngine(engine) as local:
        calibration, fits = run(
            local,
            prompts,
            gamma=engine.info.gamma,
            max_model_len=engine.info.max_model_len,
            max_tokens=args.max_tokens,
            streams=min(args.streams, config.max_num_seqs),
            seed=args.seed,
            progress=progress,
        )
    if not fits:
        raise ConfigError("too few rounds to calibrate with: nothing was written; give more prompts", param="prompts")
    path = save_calibration(calibration, out)
    if args.json:
        print(json.dumps(msgspec.to_builtins({"file": str(path), "calibration": calibration, "fits": fits})))
    else:
        print(table(calibration, fits))
        print(f"written to {path}")
    return 0


# --- profile -----------------------------------------------------------------------------------------------


def profile(args: argparse.Namespace) -> int:
    """Print the capacity curve, measured now or before, and draw it."""
    from dspark_stream.measure.profile import plot, table

    engine, _ = _load(settings.resolve(vars(args)).config, quiet=_quiet(args), measure_again=args.again)
    curve = engine.capacity
    if args.plot is not None:
        _write(args.plot, plot(curve))
    print(json.dumps(msgspec.to_builtins(curve)) if args.json else table(curve))
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


# --- reproduce ---------------------------------------------------------------------------------------------


def reproduce(args: argparse.Namespace) -> int:
    """Measure loads and schedules against each other, and write a report with a verdict."""
    from dspark_stream.console import Progress
    from dspark_stream.engine.local import LocalEngine
    from dspark_stream.measure.reproduce import FULL, QUICK, report, run, verdict
    from dspark_stream.measure.sweep import shipped_prompts

    config = settings.resolve(vars(args)).config
    plan = QUICK if args.quick else FULL
    if args.minutes is not None:
        plan = plan._replace(minutes=args.minutes)
    config = msgspec.structs.replace(config, max_num_seqs=max(config.max_num_seqs, *plan.streams))
    progress = Progress()
    engine, tokenizer = _load(config)
    if not engine.info.gamma:
        raise ConfigError("there is no drafter, so there is nothing to compare: name one with --drafter")
    if tokenizer is None:
        raise ConfigError("this model has no tokenizer, so prompts cannot be read")
    with LocalEngine(engine) as local:
        findings = run(engine, local, tokenizer, shipped_prompts(), plan, progress)
    _write(args.out, report(findings))
    print("\n".join(verdict(findings)))
    print(f"report: {args.out}")
    return 0


# --- train -------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """Train a drafter; everything about it is the training room's."""
    from dspark_stream.training.command import run

    return run(args)
