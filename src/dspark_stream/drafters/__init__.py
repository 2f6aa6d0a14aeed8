"""Drafters that the package ships: one folder each, DeepSpec's format, with a card that says how it was made."""

from __future__ import annotations

from pathlib import Path

SHIPPED = {"SmolLM2-135M-Instruct": "smollm2-135m-instruct"}
"""Target, by the last part of its name up to the first dot → folder here."""


def shipped_drafter(target_name: str) -> Path | None:
    """The folder of the drafter shipped for this target; None where there is none."""
    folder = SHIPPED.get(Path(target_name).name.partition(".")[0])
    path = Path(__file__).parent / folder if folder else None
    return path if path and (path / "config.json").exists() else None
