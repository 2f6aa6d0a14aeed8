"""What commands share: flags that several have, and how models are loaded.

Heavy imports are made where they are needed, so that ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeAlias, TypeVar

from dspark_stream import __version__
from dspark_stream.console import COLOURS
from dspark_stream.errors import ConfigError
from dspark_stream.stopping import stoppable
from dspark_stream.types import RANGES, Range, RecommendedSampling, SamplingParams

if TYPE_CHECKING:
    from dspark_stream.config import Config
    from dspark_stream.engine.boundary import Tokenizer
    from dspark_stream.engine.worker import EngineThread

PROGRAM = "dspark-stream"
EXIT_INTERNAL = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130

_Value = TypeVar("_Value")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all our errors do."""

    def error(self, message: str) -> NoReturn:
        """Leave with ``message`` and the code of a user's mistake."""
        self.exit(EXIT_USER, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; a command itself says what it does not know, and what of its own is like it."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown and self._subparsers is None:
            import difflib

            flags = [flag for action in self._actions for flag in action.option_strings]
            like = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1)
            text = next((a.dest for a in self._actions if not a.option_strings), None)
            mends = f"; did you mean {like[0]}?" if like else ""
            if text and not unknown[0].startswith("-"):
                mends = f"; a {text} of several words has to be in quotes"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{mends}")
        return found, unknown


Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_command(
    into: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    help: str,
    epilog: str,
) -> Parser:
    """Add a command; ``run`` does what it says and returns the exit code."""
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


def number(kind: type[int] | type[float], low: float, high: float, low_open: bool = False) -> Callable[[str], float]:
    """Make an argparse type for a number of a range."""
    allowed = Range(low, high, low_open)

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}") from None
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {allowed}")
        return value

    return read


def add_colour(parser: argparse.ArgumentParser) -> None:
    """Add whether an answer is tinted."""
    parser.add_argument(
        "--color",
        choices=COLOURS,
        default="auto",
        help="tint what was guessed ahead and accepted; auto: on a terminal without NO_COLOR (default: auto)",
    )


def add_decoding(parser: argparse.ArgumentParser, max_tokens: int, *, recommended: bool = False) -> None:
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
        type=number(int, 1, 1 << 24),
        default=max_tokens,
        metavar="N",
        help=f"most tokens of an answer (default: {max_tokens})",
    )
    group.add_argument(
        "--temperature",
        type=number(float, *RANGES["temperature"]),
        default=None if recommended else 0.0,
        metavar="T",
        help=f"0 takes the likeliest token; at most {RANGES['temperature'].high} (default: {otherwise}0)",
    )
    group.add_argument(
        "--top-p",
        type=number(float, *RANGES["top_p"]),
        default=None if recommended else 1.0,
        metavar="P",
        help=f"1 is off (default: {otherwise}1)",
    )
    group.add_argument(
        "--top-k",
        type=number(int, 0, 1 << 24),
        default=None if recommended else 0,
        metavar="K",
        help=f"0 is off (default: {otherwise}0)",
    )
    group.add_argument(
        "--min-p", type=number(float, *RANGES["min_p"]), default=0.0, metavar="P", help="0 is off (default: 0)"
    )
    group.add_argument(
        "--seed", type=number(int, *RANGES["seed"]), default=0, metavar="S", help="of all randomness (default: 0)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's own stop tokens")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add what is run and how it is told: the same flags for ``eval`` and ``calibrate``."""
    parser.add_argument(
        "--prompts", nargs="+", type=Path, required=True, metavar="FILE", help="prompt files (JSON lines)"
    )
    parser.add_argument(
        "--limit",
        type=lambda text: None if text == "all" else number(int, 1, 1 << 31)(text),
        default=None,
        metavar="N",
        help="take the first N prompts of each file (default: all)",
    )
    parser.add_argument(
        "--streams", type=number(int, 1, 4096), default=8, metavar="N", help="prompts at once (default: 8)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def sampling(args: argparse.Namespace, recommended: RecommendedSampling | None = None) -> SamplingParams:
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


def _first(*values: _Value | None) -> _Value:
    return next(value for value in values if value is not None)


def load(
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


def quiet(args: argparse.Namespace) -> bool:
    """Whether to show no progress: a script that reads JSON may have put stderr into the same pipe."""
    return bool(args.json) and not sys.stderr.isatty()


def write(path: Path, content: str | bytes) -> None:
    """Write a result to ``path``, whose folders are made.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
