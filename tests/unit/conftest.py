"""How many examples hypothesis tries."""

from __future__ import annotations

import os

from hypothesis import settings

# `ci` looks at the same examples in every run; `nightly` (make test-all) at many, and at others in every run.
settings.register_profile("ci", max_examples=100, derandomize=True, deadline=None, print_blob=True)
settings.register_profile("nightly", max_examples=500, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("TEST_PROFILE", "ci"))
