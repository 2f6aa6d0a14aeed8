"""What `make docs` does beside showing docs/: pages from outside it, links that lead there, a page for each event."""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from dspark_stream.server import openapi, wire  # noqa: E402  (needs nothing but msgspec and numpy)

OUTSIDE = {"README.md": "index.md", **{name: name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")}}
"""Pages that do not lie in docs/, and where they are shown."""
OBJECTS = "events/objects.md"
LINK = re.compile(r"(?<!`)\[((?:[^\[\]]|\[[^\[\]]*\])+)\]\(([^)\s]+)\)")
Schema = dict[str, Any]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the events below their index, and what they are made of."""
    api = next(entry["API"] for entry in config.nav if "API" in entry)
    events = [{name: place(name)} for name in (*client_events(), *server_events())]
    api[-1] = {"Events": ["events/index.md", *events, {"Objects": OBJECTS}]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    made = {shown: (ROOT / name).read_text() for name, shown in OUTSIDE.items()}
    for path, text in {**made, **event_pages()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the repository become links of the pages."""
    path = page.file.src_uri
    where = next((name for name, shown in OUTSIDE.items() if shown == path), f"docs/{path}")

    def follow(match: re.Match[str]) -> str:
        text, (target, hash_, anchor) = match[1], match[2].partition("#")
        if not target or ":" in target or path.startswith("events/"):
            return match[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(where), target))
        shown = OUTSIDE.get(there, there.removeprefix("docs/"))
        if shown == there and there not in OUTSIDE:
            return text  # a file of the repository that is no page
        return f"[{text}]({posixpath.relpath(shown, posixpath.dirname(path) or '.')}{hash_}{anchor})"

    return "\n".join(apart(LINK.sub(follow, markdown)))


def apart(markdown: str) -> Iterator[str]:
    """Lines, with an empty one before a list that follows text at once: elsewhere it is a list without one."""
    before, fenced = "", False
    for line in markdown.split("\n"):
        fenced ^= line.startswith("```")
        listed = re.match(r"[-*] |\d+\. ", line)
        if listed and not fenced and before and not re.match(r"[-*|#>] ?|\d+\. | ", before):
            yield ""
        yield line
        before = line


# --- events ------------------------------------------------------------------------------------------------------


def client_events() -> dict[str, str]:
    """Type of what a client may send → the name of its schema."""
    return {str(kind.__struct_config__.tag): kind.__name__ for kind in openapi.CLIENT_EVENTS}


def server_events() -> dict[str, str]:
    """The same of what comes back, in the order in which a socket sees it."""
    return {str(kind.__struct_config__.tag): kind.__name__ for kind in openapi.SERVER_EVENTS}


def place(event: str) -> str:
    """Where an event's page is."""
    return f"events/{event.replace(':', '-')}.md"


def event_pages() -> dict[str, str]:
    """Path → Markdown of every page about events, from the structs that decode and encode them."""
    schemas = openapi.schemas()
    pages: dict[str, str] = {}
    index = [
        "# Events",
        f"What goes over the WebSocket `/v1/responses`, as JSON (`{wire.JSON_PROTOCOL}`) or MessagePack "
        f"(`{wire.MSGPACK_PROTOCOL}`). Streams over HTTP have the same events, but for `dspark:hello`. These pages are "
        "made from the structs that the service decodes and encodes with; `/openapi.json` of a running service says "
        "the same to programs.",
    ]
    for title, events in (("A client sends", client_events()), ("The service sends", server_events())):
        rows = [f"| [`{event}`]({Path(place(event)).name}) | {summary(schemas[n])} |" for event, n in events.items()]
        index += [f"## {title}", "\n".join(["| event | |", "| --- | --- |", *rows])]
        for event, name in events.items():
            pages[place(event)] = f"# `{event}`\n\n{summary(schemas[name])}\n\n{fields(schemas[name])}\n"
    pages["events/index.md"] = "\n\n".join(index) + "\n"
    events_ = {*client_events().values(), *server_events().values()}
    objects = [f"## {name}\n\n{summary(schema)}\n\n{fields(schema)}" for name, schema in sorted(schemas.items())
               if name not in events_]  # fmt: skip
    pages[OBJECTS] = "# Objects\n\nWhat events, bodies and answers are made of.\n\n" + "\n\n".join(objects) + "\n"
    return pages


def summary(schema: Schema) -> str:
    """What a struct's docstring says, in one line."""
    return " ".join(schema.get("description", "").split()).replace("``", "`")


def fields(schema: Schema) -> str:
    """A table of an object's fields; those that must be there first."""
    required = schema.get("required", [])
    rows = ["| field | type | |", "| --- | --- | --- |"]
    for name, said in sorted(schema.get("properties", {}).items(), key=lambda item: item[0] not in required):
        note = summary(said)
        if name not in required:
            default = said.get("default", None)
            note += f" Default: `{default}`." if default not in (None, [], {}) else " May be absent."
        rows.append(f"| `{name}` | {shape(said)} | {note.strip()} |")
    return "\n".join(rows)


def shape(schema: Schema) -> str:
    """A type as people write it."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}]({Path(OBJECTS).name}#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(shape, schema["anyOf"])))
    if "enum" in schema or "const" in schema:
        return " or ".join(f'`"{value}"`' for value in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return f"({', '.join(map(shape, schema['prefixItems']))})"
    kind = schema.get("type", "anything")
    if kind == "array":
        items = schema.get("items")
        return f"list of {shape(items)}" if items else "list"
    return str(kind)
