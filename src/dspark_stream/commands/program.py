"""The command line as a whole: which commands there are, and the exit codes.

Nothing heavy is imported here, so that ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from dspark_stream import __version__
from dspark_stream.commands import calibrate, chat, eval, generate, models, profile, reproduce, serve, train
from dspark_stream.commands.common import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_USER, PROGRAM, Parser
from dspark_stream.errors import DsparkError, EngineFailedError, InternalError

COMMANDS = (serve, chat, generate, models, eval, calibrate, profile, reproduce, train)
"""In the order that ``--help`` lists them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0 done, 1 our fault, 2 the user's, 130 interrupted."""
    parser = _build_parser()
    args = argparse.Namespace(flags={})
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a diff that is piped in may hold any bytes
    try:
        args = parser.parse_args(argv)
        code: int = args.run(args)
    except DsparkError as error:
        # who raised it knows the setting, and may not know that a flag sets it
        flag = args.flags.get(error.param)
        mends = f" ({flag})" if flag and flag not in str(error) else ""
        print(f"{PROGRAM}: error: {error}{mends}", file=sys.stderr)
        return EXIT_INTERNAL if isinstance(error, InternalError | EngineFailedError) else EXIT_USER
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our stdout has gone (| head): nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Streams text from DSpark speculative decoding, verified token by verified token.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    into = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(into)
    for sub in into.choices.values():
        sub.set_defaults(flags={a.dest: a.option_strings[0] for a in sub._actions if a.option_strings})
    return parser
