"""The program's door: ``dspark-stream`` and ``python -m dspark_stream``. Ctrl-C is quiet from here on.

Nothing is imported before `main` but what Python itself brings.
"""

import os
import signal
import sys

EXIT_INTERRUPTED = 130


def main() -> int:
    """Run the program; returns its exit code (`program.main`)."""
    # Until its modules are there, nothing needs clearing up, and an exception would be told in ten lines of imports.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(EXIT_INTERRUPTED))
    from dspark_stream.commands.program import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = run()
    except KeyboardInterrupt:  # before, or after, anybody was there to answer for it
        code = EXIT_INTERRUPTED
    # What is left is Python's own end, which a second Ctrl-C may cut short without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


if __name__ == "__main__":
    sys.exit(main())
