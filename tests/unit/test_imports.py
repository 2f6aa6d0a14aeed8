"""Who may import whom: downward only. Reads the source; imports nothing of it."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "dspark_stream"
KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "dspark_kernels"

LEAVES = {"config", "errors", "files", "types", "console", "logs", "stopping"}
ENGINE_AND_BELOW = {"engine", "load", "decoding", "models", "kernels", *LEAVES}
TOOLS = {"generate", "measure"}  # the engine used in this process
MAY_IMPORT = {
    "__main__": {"cli"},
    "cli": {"commands", "training", "measure", *LEAVES},
    "commands": {"server", "client", "training", "drafters", *TOOLS, *ENGINE_AND_BELOW},
    "server": ENGINE_AND_BELOW - {"kernels", "models", "decoding", "load"},
    "client": set(LEAVES) - {"config"},
    "generate": ENGINE_AND_BELOW,
    "measure": ENGINE_AND_BELOW,
    "training": {"measure", *ENGINE_AND_BELOW},
    "engine": {"drafters", *ENGINE_AND_BELOW},
    "load": {"decoding", *LEAVES},
    "decoding": {"models", "kernels", *LEAVES},
    "models": {"kernels", *LEAVES},
    "config": {"errors"},
    "errors": set(),
    "files": set(),
    "types": set(),
    "console": set(),
    "stopping": set(),
    "logs": set(),
    "kernels": set(),
    "drafters": {"models"},
}
MODELS = {
    "facts": {"facts"},
    "protocols": {"facts"},
    "torch": {"protocols", "facts"},
    "native": {"torch", "protocols", "facts"},  # torch's heads, for what has no kernel
    "files": {"native", "torch", "protocols", "facts"},
}
"""The models' room has an order of its own: what holds for every runner, what is asked of one, the two, and the files
that either is made from."""
FILES = {"checkpoint", "loading"}
SOCKETS = {"aiohttp", "websockets"}
MAY_OPEN_SOCKETS = {"server", "client"}


def rooms() -> dict[Path, str]:
    files = {}
    for path in SOURCE.rglob("*.py"):
        relative = path.relative_to(SOURCE)
        files[path] = relative.parts[0].removesuffix(".py")
    files |= dict.fromkeys(KERNELS.rglob("*.py"), "kernels")
    return {path: room for path, room in files.items() if room != "__init__"}


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in the file it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> str | None:
    """The room that an import leads into; None for other people's packages and the bare package."""
    package, *rest = name.split(".")
    if package == "dspark_kernels":
        return "kernels"
    if package == "dspark_stream" and rest and not rest[0].startswith("__version"):
        return rest[0]
    return None


@pytest.mark.parametrize("path", sorted(rooms()), ids=lambda path: str(path.relative_to(path.parents[2])))
def test_imports_run_downward(path):
    room = rooms()[path]
    assert room in MAY_IMPORT, f"{room} is new: say in MAY_IMPORT where it stands"
    names = imported(path)
    upward = {name for name in names if (to := room_of(name)) is not None and to not in MAY_IMPORT[room] | {room}}
    assert not upward, f"{room} may not import {sorted(upward)}"
    if room not in MAY_OPEN_SOCKETS:
        assert not {name.partition(".")[0] for name in names} & SOCKETS, "only server and client touch sockets"


def part_of_models(name: str) -> str | None:
    """Which part of the models' room a full name leads into; None: another room."""
    package, *rest = name.split(".")
    if package != "dspark_stream" or rest[:1] != ["models"] or len(rest) < 2:
        return None
    return "files" if rest[1] in FILES else rest[1] if rest[1] in MODELS else "facts"


@pytest.mark.parametrize("path", sorted((SOURCE / "models").rglob("*.py")), ids=lambda path: path.stem)
def test_the_models_room_has_an_order(path):
    part = part_of_models(".".join(path.relative_to(SOURCE.parent).with_suffix("").parts))
    upward = {name for name in imported(path) if (to := part_of_models(name)) and to not in MODELS[part] | {part}}
    assert not upward, f"{part} may not import {sorted(upward)}"


def test_the_order_has_no_circle():
    order: dict[str, set[str]] = {}

    def below(room: str, path: tuple[str, ...]) -> set[str]:
        assert room not in path, f"circle: {' → '.join((*path, room))}"
        if room not in order:
            order[room] = set().union(*({to} | below(to, (*path, room)) for to in MAY_IMPORT[room] - {room}))
        return order[room]

    for room in MAY_IMPORT:
        below(room, ())
