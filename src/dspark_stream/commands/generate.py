"""``dspark-stream generate``: one answer, with what every round did, for scripts and for people."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from dspark_stream import config as settings
from dspark_stream.client.words import Figures, tinted, why_none
from dspark_stream.commands import common
from dspark_stream.console import DIM, Colour, coloured, paint, printable
from dspark_stream.errors import ConfigError, InternalError
from dspark_stream.types import FinishReason, GenerationRequest, Piece, RoundRecord, TokensEvent, Usage

if TYPE_CHECKING:
    from dspark_stream.engine.boundary import Tokenizer
    from dspark_stream.engine.local import LocalEngine

_EPILOG = """\
examples:
  dspark-stream generate "Why is the sky blue?"
  dspark-stream generate "Why is the sky blue?" --mode plain --max-tokens 64
  git show | dspark-stream generate --max-tokens 64
  dspark-stream generate --input-ids 1,2,3 --model ./target --drafter ./draft --ignore-eos --json

--json prints one object: output_ids, text, finish_reason (stop, length), accepted_length (tokens a
verification round commits), tokens_per_s (tokens after the first, over the time since the first), usage, and
rounds: for each one start (position of the anchor), anchor, draft_tokens, scheduled (how many were verified),
accepted, bonus (the target's own token) and confidence.
"""


class Round(msgspec.Struct, frozen=True):
    """The part of a `RoundRecord` that is the same on every machine, timings left out."""

    start: int
    anchor: int
    draft_tokens: list[int]
    scheduled: int
    accepted: int
    bonus: int
    confidence: list[float]

    @classmethod
    def of(cls, record: RoundRecord) -> Round:
        """Take these fields from ``record``."""
        return cls(*(getattr(record, name) for name in cls.__struct_fields__))


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The object that ``--json`` prints."""

    output_ids: list[int]
    text: str
    finish_reason: FinishReason
    accepted_length: float | None
    """None where no round was run: the first token comes out of the prompt's own pass."""
    tokens_per_s: float | None
    """Tokens after the first over the time since the first; None where there was but one."""
    rounds: list[Round]
    usage: Usage


def answer(
    engine: LocalEngine, request: GenerationRequest, on_pieces: Callable[[list[Piece]], None] | None = None
) -> Answer:
    """Run ``request`` to its end; ``on_pieces`` gets each round's text as it comes.

    Raises:
        DsparkError: the engine refuses the request, or the stream failed.
    """
    ids: list[int] = []
    texts: list[str] = []
    rounds: list[Round] = []
    for event, _ in engine.run([request]):
        if isinstance(event, TokensEvent):
            ids += event.token_ids
            texts.append(event.text)
            if on_pieces is not None and event.text:
                on_pieces(event.pieces)
            if event.round is not None:
                rounds.append(Round.of(event.round))
            continue
        if event.reason == "failed":
            raise InternalError(event.error.message if event.error else "the stream failed")
        usage = event.usage
        timed = usage.output_tokens > 1 and usage.decode_ms > 0
        return Answer(
            output_ids=ids,
            text="".join(texts),
            finish_reason=event.reason,
            accepted_length=usage.accepted_length if usage.rounds else None,
            tokens_per_s=1000 * (usage.output_tokens - 1) / usage.decode_ms if timed else None,
            rounds=rounds,
            usage=usage,
        )
    raise InternalError("the stream ended without a word")


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        ids = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids like 1,2,3") from None
    if not ids or min(ids) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: one or more token ids are needed, none below 0")
    return ids


def add(into: common.Subparsers) -> None:
    """Add ``generate`` and its flags."""
    parser = common.add_command(into, "generate", run, "answer one prompt", _EPILOG)
    source = parser.add_mutually_exclusive_group()
    parser.add_argument(
        "positional_prompt",
        nargs="?",
        metavar="PROMPT",
        help="a user's turn, put into the model's chat template; -, or none and a pipe: read from stdin",
    )
    source.add_argument("--prompt", metavar="TEXT", help="the same as PROMPT")
    source.add_argument(
        "--input-ids",
        type=_token_ids,
        metavar="1,2,3",
        help="token ids as they are; works for a model without a tokenizer",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    common.add_colour(parser)
    common.add_decoding(parser, max_tokens=256, recommended=True)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    settings.add_arguments(parser, ("model", "engine"))


def run(args: argparse.Namespace) -> int:
    """Answer one prompt; text or JSON on stdout, figures on stderr."""
    from dspark_stream.engine.local import LocalEngine

    if "" in args.stop:
        raise ConfigError("--stop: an empty text would end every answer at once")
    if args.positional_prompt is not None and (args.prompt is not None or args.input_ids is not None):
        # not argparse's to say: what follows a misspelt flag would count as PROMPT, and be blamed
        raise ConfigError("PROMPT, --prompt and --input-ids each say what is to be answered; give one of them")
    prompt = None if args.input_ids is not None else _prompt(args)
    engine, tokenizer = common.load(settings.resolve(vars(args)).config, quiet=common.quiet(args))
    request = GenerationRequest(
        request_id="generate",
        prompt_ids=args.input_ids if prompt is None else _encode(prompt, tokenizer),
        sampling=common.sampling(args, engine.info.sampling),
        mode=args.mode,
        verification=args.verification,
        record_rounds=True,
    )
    with LocalEngine(engine) as local:
        answered = answer(local, request, None if args.json else _shower(args.color))
    if args.json:
        print(json.dumps(msgspec.to_builtins(answered)))
        return 0
    print()
    usage, figures = answered.usage, Figures()
    figures.add(
        tokens=usage.output_tokens,
        rounds=usage.rounds,
        drafted=usage.drafted,
        accepted=usage.accepted,
        decode_ms=usage.decode_ms,
    )
    said = figures.words(why_none(args.mode, engine.info.gamma, engine.info.schedule))
    ending = ", cut by --max-tokens" if answered.finish_reason == "length" else ""
    print(paint(f"[{said}{ending}]", DIM, sys.stderr, args.color), file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    """What is to be answered: an argument, or stdin where it is asked for or piped in."""
    given: str | None = args.prompt if args.positional_prompt is None else args.positional_prompt
    piped = sys.stdin is not None  # it is None where whoever started us closed it
    if given is None and (not piped or sys.stdin.isatty()):
        raise ConfigError(f"there is no prompt: {_WAYS}", param="prompt")
    if given in (None, "-"):
        given = sys.stdin.read().removesuffix("\n") if piped else ""
    if not given:
        raise ConfigError(f"the prompt is empty: {_WAYS}", param="prompt")
    return given


_WAYS = 'dspark-stream generate "Why is the sky blue?", --prompt TEXT, --input-ids 1,2,3, or a text on stdin'


def _encode(prompt: str, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if tokenizer is None:
        raise ConfigError("this model has no tokenizer, so a prompt cannot be read; give --input-ids 1,2,3")
    return tuple(tokenizer.encode_chat([("user", prompt)]))


def _shower(colour: Colour) -> Callable[[list[Piece]], None]:
    """What shows an answer: tinted, made safe for a terminal, or, on a pipe, as it is."""
    colours, terminal = coloured(sys.stdout, colour), sys.stdout.isatty()

    def show(pieces: list[Piece]) -> None:
        text = "".join(piece.text for piece in pieces)
        if colours:
            text = tinted((piece.text, piece.drafted) for piece in pieces)
        elif terminal:
            text = printable(text)
        print(text, end="", flush=True)

    return show
