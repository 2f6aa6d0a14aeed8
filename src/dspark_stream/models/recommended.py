"""How a model's makers want it sampled: from the table of names, or from a folder's ``generation_config.json``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dspark_stream.models.names import MODELS, recognise
from dspark_stream.types import RANGES, RecommendedSampling

log = logging.getLogger(__name__)

FILE = "generation_config.json"
_USABLE: dict[str, Callable[[Any], bool]] = {
    "temperature": lambda value: _is_number(value) and value in RANGES["temperature"],
    "top_p": lambda value: _is_number(value) and value in RANGES["top_p"],
    "top_k": lambda value: type(value) is int and value in RANGES["top_k"],
}
"""What a recommendation has to be: within what the API allows."""


def recommended_sampling(model: str) -> RecommendedSampling:
    """For a name, a folder, a file or a hub name that has been fetched; what is not recommended is None."""
    path = None if model in MODELS else _generation_config(model)
    if path is not None:
        return read_generation_config(path)
    known = recognise(model)
    return known.sampling if known else RecommendedSampling()


def read_generation_config(path: Path) -> RecommendedSampling:
    """The file's temperature (0 where it says not to sample), top-p and top-k; what is no use there is left out."""
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or no text
        log.warning("%s cannot be read, so it recommends nothing: %s", path, error)
        return RecommendedSampling()
    if raw.get("do_sample") is False:
        return RecommendedSampling(temperature=0.0)
    found = {name: raw[name] for name in _USABLE if raw.get(name) is not None}
    for name in [name for name, value in found.items() if not _USABLE[name](value)]:
        log.warning("%s recommends %s %r, which cannot be; left out", path, name, found.pop(name))
    return RecommendedSampling(**found)


def _generation_config(model: str) -> Path | None:
    folder = Path(model).expanduser()
    if folder.exists():
        return folder / FILE if (folder / FILE).is_file() else None
    if model.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, FILE)
    return Path(cached) if isinstance(cached, str) else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # and no bool
