"""``python -m dspark_stream`` is ``dspark-stream``."""

from dspark_stream.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
