"""Accepted length by context length and by how much of it a draft block sees, greedy, all drafts verified.

Each prompt is a task on a module of Python's standard library, cut to so many tokens. It goes through the target once;
then every window drafts for the same answer. What is committed is the target's own text whatever the window.

    python bench/context_window.py --lengths 128 1024 2048 4096 8192 --windows 0 256 512 1024
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

from common import write_csv
from dspark_kernels.cpu import Context, best_isa
from dspark_stream.config import Config, default_cache_dir
from dspark_stream.console import Progress
from dspark_stream.drafters import shipped_drafter
from dspark_stream.models.cache import Extent
from dspark_stream.models.checkpoint import load_drafter
from dspark_stream.models.fetch import model_path
from dspark_stream.models.loading import load_target
from dspark_stream.models.native.drafter import NativeDrafter
from dspark_stream.models.native.target import NativeTarget
from dspark_stream.models.protocols import Draw, Rows
from dspark_stream.models.tokenizer import TextCodec
from dspark_stream.types import SamplingParams

MODULES = ("argparse", "ast", "configparser", "csv", "dataclasses", "difflib", "enum", "functools", "heapq", "inspect")
TASKS = (
    "Explain step by step what this code does.",
    "Write unit tests for the most important function of this code.",
    "Add type hints and docstrings to the first function or class of this code.",
    "Find a function that could be simpler and rewrite it.",
)
PIECE = 256


class Case:
    """A prompt that has been through the target."""

    def __init__(self, target: NativeTarget, codec: TextCodec, text: str, task: str, length: int) -> None:
        cut = codec.decode(codec.encode(text)[:length])
        self.ids = codec.encode_chat([("user", f"{task}\n\n```python\n{cut}\n```")])
        self.extent = Extent(0, len(self.ids) + 1024)
        self.store = target.make_store(self.extent.size)
        self.taps = []
        last = len(self.ids) - 1
        for start in range(0, last, PIECE):
            piece = self.ids[start : min(start + PIECE, last)]
            output = target.forward([Rows(self.extent, start, piece)], self.store, [], greedy=True)
            self.taps.append(output.taps.clone())

    def accepted(self, target: NativeTarget, drafter: NativeDrafter, tokens: int) -> tuple[int, int]:
        """Rounds and committed tokens of an answer of at least so many tokens, or until it ends."""
        store = drafter.make_store(drafter.ring or self.extent.size)
        skipped = max(0, len(self.ids) - 1 - drafter.context_window) if drafter.context_window else 0
        for at, taps in enumerate(self.taps):
            positions = range(at * PIECE, at * PIECE + len(taps))
            seen = [p for p in positions if p >= skipped]
            if seen:
                slots = self.extent.context_slots(seen, drafter.ring)
                drafter.append_context(taps[len(taps) - len(seen) :].contiguous(), seen, slots, store)
        position, anchor, rounds, committed = len(self.ids) - 1, self.ids[-1], 0, 0
        greedy = Draw(SamplingParams(max_tokens=1, temperature=0.0))
        while committed < tokens:
            block = drafter.draft([(self.extent, position, anchor)], store, drafter.gamma, [greedy]).tokens[0]
            output = target.forward([Rows(self.extent, position, [anchor, *block])], self.store, greedy=True)
            own = output.best(range(len(block) + 1))
            accepted = next((k for k, token in enumerate(block) if own[k] != token), len(block))
            kept = list(range(position, position + accepted + 1))
            slots = self.extent.context_slots(kept, drafter.ring)
            drafter.append_context(output.taps[: accepted + 1].clone(), kept, slots, store)
            rounds, committed = rounds + 1, committed + accepted + 1
            position, anchor = position + accepted + 1, own[accepted]
            if set(own[: accepted + 1]) & set(target.eos_token_ids):
                break
        return rounds, committed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Config().model)
    parser.add_argument("--drafter", type=Path, default=None, help="folder (default: the one shipped)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 2048, 4096, 8192])
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 256, 512, 1024], help="0: all of the context")
    parser.add_argument("--prompts", type=int, default=6, help="of each length")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--out", type=Path, default=Path("runs/context_window.csv"))
    args = parser.parse_args()
    path = model_path(args.model, default_cache_dir(), Progress())
    loaded = load_target(path, kernels=Context(2, best_isa()))
    target, codec = loaded.target, loaded.codec
    folder = args.drafter or shipped_drafter(args.model)
    if not isinstance(target, NativeTarget) or codec is None or folder is None:
        parser.error("a model that the CPU kernels run is needed, with a tokenizer and a drafter")
    whole = load_drafter(folder, target)
    drafters = {window: whole.seeing(window) for window in args.windows}
    rows: list[dict[str, object]] = []
    library = Path(sysconfig.get_path("stdlib"))
    for length in args.lengths:
        sums = dict.fromkeys(args.windows, (0, 0))
        for number in range(args.prompts):
            text = (library / f"{MODULES[number % len(MODULES)]}.py").read_text()
            case = Case(target, codec, text, TASKS[number % len(TASKS)], length)
            for window, drafter in drafters.items():
                rounds, committed = case.accepted(target, drafter, args.tokens)
                sums[window] = sums[window][0] + rounds, sums[window][1] + committed
        for window, (rounds, committed) in sums.items():
            rows.append({"context": length, "window": window, "rounds": rounds, "accepted_length": committed / rounds})
        print(length, *(f"{w}: {c / r:.2f}" for w, (r, c) in sums.items()), flush=True)
    write_csv(args.out, rows)


if __name__ == "__main__":
    main()
