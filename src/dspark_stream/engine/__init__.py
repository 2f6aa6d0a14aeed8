"""Requests in, events out. The boundary is the `Engine` protocol in `boundary.py`."""
