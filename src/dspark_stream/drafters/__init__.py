"""Drafters that the package ships: one folder each, DeepSpec's format, with a card that says how it was made."""

from __future__ import annotations

from pathlib import Path

from dspark_stream.models.names import recognise


def shipped_drafter(target: str) -> Path | None:
    """The folder of the drafter shipped for this target, by its name or file; None where there is none."""
    model = recognise(target)
    path = Path(__file__).parent / model.drafter if model and model.drafter else None
    return path if path and (path / "config.json").exists() else None
