"""`serve` with a fake engine, as a process of its own: what `test_wire_serve` sends signals to.

Usage: fake_server.py PORT SHUTDOWN_TIMEOUT_S. Prints the page's address when it is ready. SIGUSR1 breaks the engine.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dspark_stream.errors import ConfigError, EngineFailedError
from dspark_stream.server import app
from dspark_stream.server.settings import ServerConfig
from fakes import FakeEngine, FakeTokenizer, Script

if __name__ == "__main__":
    config = ServerConfig(port=int(sys.argv[1]), shutdown_timeout_s=float(sys.argv[2]), close_timeout_s=0.5)
    engine = FakeEngine(Script(tokens=["word "] * 1000, rounds=(1,)), step_s=0.01)
    app.FAILURE_SHOWN_S = 0.5
    broken = threading.Thread(target=engine.fail, args=("a test broke it",))
    signal.signal(signal.SIGUSR1, lambda *_: broken.start())
    try:
        uvloop.run(
            app.serve(config, engine, FakeTokenizer(), ready=lambda server: print(server.url, flush=True)),
        )
    except ConfigError as error:
        sys.exit(f"{error.param}: {error}")
    except EngineFailedError as error:
        sys.exit(f"{error}")
