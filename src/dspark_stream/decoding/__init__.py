"""The algorithm: draft, schedule, verify, accept. Knows models, never the engine."""
