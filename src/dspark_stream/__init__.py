"""DSpark speculative decoding, streamed."""

__version__ = "0.1.0"
