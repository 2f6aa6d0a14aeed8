"""``dspark-stream chat``: talk to a running service; the flags become the client's options."""

from __future__ import annotations

import argparse
import os
from textwrap import indent

from dspark_stream.client.words import HELP
from dspark_stream.commands import common
from dspark_stream.types import RANGES

_EPILOG = f"""\
commands in the chat:
{indent(HELP, "  ")}

Text that one verification accepted of what was guessed ahead is tinted on a terminal, unless NO_COLOR is set.

examples:
  dspark-stream chat
  dspark-stream chat "Why is the sky blue?"
  dspark-stream chat --seed 7 --temperature 0.8
  echo "Why is the sky blue?" | dspark-stream chat
  DSPARK_API_KEY=... dspark-stream chat --url wss://chat.example.org
"""


def add(into: common.Subparsers) -> None:
    """Add ``chat`` and its flags."""
    parser = common.add_command(into, "chat", run, "talk to a running service in the terminal", _EPILOG)
    parser.add_argument("question", nargs="?", default="", help="one question; its answer, and no conversation")
    parser.add_argument(
        "--url", default="ws://127.0.0.1:8000", help="where the service is (default: ws://127.0.0.1:8000)"
    )
    parser.add_argument(
        "--api-key", default=os.environ.get("DSPARK_API_KEY", ""), metavar="KEY", help="[DSPARK_API_KEY]"
    )
    parser.add_argument("--instructions", default="", metavar="TEXT", help="system message of the conversation")
    parser.add_argument("--plain", action="store_true", help="begin without speculation")
    parser.add_argument(
        "--verification",
        choices=("rejection", "coupled"),
        default="",
        help="how drafts are accepted (default: coupled with a seed, else rejection)",
    )
    common.add_colour(parser)
    parser.add_argument(
        "--max-tokens",
        type=common.number(int, 1, 1 << 24),
        default=None,
        metavar="N",
        help="most tokens of an answer",
    )
    parser.add_argument(
        "--temperature",
        type=common.number(float, *RANGES["temperature"]),
        default=None,
        metavar="T",
        help=f"0 takes the likeliest token; at most {RANGES['temperature'].high} (default: what is recommended for the "
        "model)",
    )
    parser.add_argument(
        "--seed",
        type=common.number(int, *RANGES["seed"]),
        default=None,
        metavar="S",
        help="the same seed gives the same answer to the same question (default: any)",
    )


def run(args: argparse.Namespace) -> int:
    """Talk to a service; the flags become the client's options."""
    from dspark_stream.client.terminal import ChatOptions
    from dspark_stream.client.terminal import chat as talk

    given = {"max_output_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
    return talk(
        ChatOptions(
            url=args.url,
            question=args.question,
            api_key=args.api_key,
            instructions=args.instructions,
            mode="plain" if args.plain else "dspark",
            verification=args.verification,
            colour=args.color,
            settings={name: value for name, value in given.items() if value is not None},
        )
    )
