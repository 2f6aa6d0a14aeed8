"""What strangers may do to a service, tried on one of our own: cancels, fuzz, bombs, slow heads, long prompts, a
greedy neighbour, 300 at once, kill and restart. Loopback only, ten minutes at most.

Prints what was found beside its limit; the exit status is 1 where one is missed.

    python bench/abuse.py                  # or make abuse
    python bench/abuse.py --only fuzz bombs
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time

from attacks import ATTACKS, Row
from own_service import KEYS, MARK, OwnService, Victim, many_descriptors

BUDGET_S = 580.0
"""From the first start on."""
ATTACK_S = 130.0
FLAGS = ["--max-num-seqs", "32", "--max-queue", "64", "--max-model-len", "8192", "--shutdown-timeout", "2"]


def log_rows(service: OwnService) -> list[Row]:
    """What the log must not have."""
    text = service.log.read_text(errors="replace")
    secrets = sum(any(secret in line for secret in (*KEYS.values(), MARK)) for line in text.splitlines())
    return [Row("lines with a key or a prompt", secrets, 0), Row("tracebacks", text.count("Traceback"), 0)]


async def run(service: OwnService, names: list[str], seed: int, end: float) -> list[tuple[str, Row]]:
    """All attacks in turn, as long as there is time."""
    rows: list[tuple[str, Row]] = []
    await Victim(service).run(2)  # warm-up
    for name in names:
        begun = time.monotonic()
        try:
            async with asyncio.timeout(min(ATTACK_S, max(0.0, end - begun))):
                found = await ATTACKS[name](service, random.Random(seed))
        except TimeoutError:
            found = [Row(f"NOT DONE in {time.monotonic() - begun:.0f} s", float("inf"), 0)]
        except Exception as error:  # the service may be in any state: the other attacks are tried all the same
            found = [Row(f"BROKEN OFF: {error!r:.80}", float("inf"), 0)]
        if service.process is None or service.process.poll() is not None:
            found.append(Row("the service was gone", 1, 0))
            service.start()
        rows += ((name, row) for row in found)
        for row in found:
            print(_line(name, row), flush=True)
        print(f"    ({time.monotonic() - begun:.0f} s)", flush=True)
    rows += (("log", row) for row in log_rows(service))
    return rows


def _line(name: str, row: Row) -> str:
    found, limit = (f"{value:,.4g} {row.unit}".strip() for value in (row.found, row.limit))
    return f"| {name} | {row.what} | {found} | {limit} | {'kept' if row.kept else 'MISSED'} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), default=list(ATTACKS), metavar="ATTACK")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="the rest: flags of the service")
    args = parser.parse_args()
    many_descriptors()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the service must not outlive us
    end = time.monotonic() + BUDGET_S
    service = OwnService(args.model, [*FLAGS, *args.flags])
    try:
        print(f"up after {service.start():.1f} s", flush=True)
        rows = asyncio.run(run(service, args.only, args.seed, end))
    finally:
        service.close()
    print("\n| attack | figure | found | limit | |\n| --- | --- | --- | --- | --- |")
    print(*(_line(*row) for row in rows), sep="\n")
    missed = sum(not row.kept for _, row in rows)
    print(f"\n{missed} of {len(rows)} limits are missed" if missed else f"\nall {len(rows)} limits are kept")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
