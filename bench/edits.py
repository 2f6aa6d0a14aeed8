"""What lookup brings where text repeats itself: twenty edits of a file, with lookup, without it, and plainly.

The files are the first lines of this project's own source; each is to be given back with one name changed. The three
take turns at every prompt, in one process on one engine's weights each. Prints tokens a second of each and their
ratios (median and quartiles over prompts), writes a line an answer.

    python bench/edits.py --tokens 300
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

from common import write_csv
from dspark_stream.config import Config
from dspark_stream.console import Progress
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.local import LocalEngine
from dspark_stream.types import GenerationRequest, SamplingParams, TokensEvent

SOURCE = Path(__file__).resolve().parents[1] / "src" / "dspark_stream"
WAYS = ("plain", "dspark", "lookup")


def prompts(count: int, lines: int) -> list[str]:
    """Files of so many lines at least, their most frequent longer name to be changed."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text().splitlines()
        if len(text) < lines or len(found) == count:
            continue
        part = "\n".join(text[:lines])
        names = Counter(re.findall(r"\b[a-z]+_[a-z_]+\b", part))
        if names:
            name = names.most_common(1)[0][0]
            found.append(
                f"Rename `{name}` to `{name}_now` everywhere in this file. Answer with the whole file and nothing "
                f"else.\n\n```python\n{part}\n```"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--lines", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/edits.csv"))
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    with ExitStack() as engines:
        built = {}
        for lookup in (True, False):
            engine, tokenizer = build_engine(
                Config(model=args.model, lookup=lookup, max_num_seqs=1, max_model_len=8192), Progress()
            )
            assert tokenizer is not None
            built[lookup] = engines.enter_context(LocalEngine(engine)), tokenizer
        for number, text in enumerate(prompts(args.prompts, args.lines)):
            answers = {}
            for way in WAYS[number % 3 :] + WAYS[: number % 3]:  # nobody always goes first
                local, tokenizer = built[way == "lookup"]
                request = GenerationRequest(
                    request_id=f"{way}-{number}",
                    prompt_ids=tuple(tokenizer.encode_chat([("user", text)])),
                    sampling=SamplingParams(max_tokens=args.tokens, temperature=0.0),
                    mode="plain" if way == "plain" else "dspark",
                    record_rounds=True,
                )
                ids: list[int] = []
                rounds = looked_up = 0
                first_s = last_s = time.perf_counter()
                for event, at_s in local.run([request]):
                    if isinstance(event, TokensEvent):
                        first_s = first_s if ids else at_s
                        ids += event.token_ids
                        last_s = at_s
                        rounds += event.round is not None
                        looked_up += event.round is not None and event.round.source == "lookup"
                answers[way] = ids
                rows.append(
                    {
                        "model": args.model, "prompt": number, "way": way, "prompt_tokens":
                        len(request.prompt_ids), "tokens": len(ids), "rounds": rounds, "looked_up": looked_up,
                        "tokens_per_s": round((len(ids) - 1) / (last_s - first_s), 2) if last_s > first_s else "",
                        "same_as_plain": "",
                    }
                )  # fmt: skip
            for row in rows[-3:]:
                row["same_as_plain"] = answers[str(row["way"])] == answers["plain"]
            print({str(row["way"]): row["tokens_per_s"] for row in rows[-3:]}, flush=True)
    write_csv(args.out, rows)
    show(rows)


def show(rows: list[dict[str, object]]) -> None:
    """Medians over prompts."""
    speeds = {way: {r["prompt"]: float(str(r["tokens_per_s"])) for r in rows if r["way"] == way} for way in WAYS}
    for way, some in speeds.items():
        print(f"{way:>8} {median(some.values()):7.1f} tokens/s")
    for over in ("plain", "dspark"):
        ratios = [speeds["lookup"][n] / speeds[over][n] for n in speeds[over]]
        low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(f"  lookup over {over}: {middle:.2f} ({low:.2f} to {high:.2f})")
    print(f"  answers that are plain's: {sum(bool(r['same_as_plain']) for r in rows)} of {len(rows)}")


if __name__ == "__main__":
    main()
