"""What the start foretells of memory is what a full service takes."""

from __future__ import annotations

import re
import subprocess
import sys

PROGRAM = """
import io, random, re, threading
import msgspec
from dspark_stream.config import Config
from dspark_stream.console import Progress
from dspark_stream.engine import memory, profile
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.local import LocalEngine
from dspark_stream.types import FinishedEvent, GenerationRequest, SamplingParams

profile.BUDGET_S = 1.0
STREAMS, KV = 6, 192 << 20
config = Config(model="smollm2-135m", max_num_seqs=STREAMS, kv_memory=KV, max_model_len=1152)
said = io.StringIO()
engine, _ = build_engine(config, Progress(said), measure_again=True)
(told,) = re.findall(r"up to ([\\d.]+) GiB", said.getvalue())
longest = engine._allocator.total // STREAMS // 16 * 16 - engine.info.gamma - 1
# so that the streams fill the memory to its end
engine.info = msgspec.structs.replace(engine.info, max_model_len=longest)
chance, most, going = random.Random(1), 0, True

def watch():
    global most
    while going:
        most = max(most, memory.resident_bytes())
        threading.Event().wait(0.05)

watcher = threading.Thread(target=watch)
watcher.start()
with LocalEngine(engine) as local:
    asked = [
        GenerationRequest(
            request_id=str(i),
            prompt_ids=tuple(chance.randrange(1000, 40000) for _ in range(longest - 24)),
            sampling=SamplingParams(max_tokens=24, temperature=float(i % 2), ignore_eos=True),
        )
        for i in range(STREAMS)
    ]
    used = 0
    for event, _ in local.run(asked, STREAMS):
        used = max(used, engine.snapshot().kv_tokens_used)
        assert not isinstance(event, FinishedEvent) or event.reason == "length", event
going = False
watcher.join()
print("used", used / engine._allocator.total, "foretold", float(told) * 2**30, "found", most)
"""


def test_a_full_service_takes_what_was_foretold():
    """Guards against a forecast that counts pages twice which measuring has touched, or leaves out what rounds need: a
    container's limit is set by it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    used, foretold, found = map(float, re.findall(r"\w+ ([\d.]+)", done.stdout.splitlines()[-1]))
    assert used > 0.95
    assert abs(found / foretold - 1) < 0.1, done.stdout
