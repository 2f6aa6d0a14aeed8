"""What is written for people keeps to its form: lengths, no hashes in the README, an index that says what holds."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DECISIONS = ROOT / "docs" / "decisions"
WIDTH = 120
LEFT_OUT = {".git", ".venv", ".venv-clients", "node_modules", "vendor", "runs", "build", "dist", "shared"}


def written() -> list[Path]:
    """The Markdown files of the project: those of git, or, in a copy without git, those that lie there."""
    asked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = asked.stdout.split("\n") if asked.returncode == 0 else [p.relative_to(ROOT) for p in ROOT.rglob("*.md")]
    paths = [ROOT / name for name in names if name]
    return sorted(p for p in paths if p.exists() and not LEFT_OUT & set(p.relative_to(ROOT).parts))


def prose(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of what is read as running text: no code, no tables."""
    fenced = listed = False
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.lstrip().startswith("|"):
            continue
        elif line.startswith("    ") and not listed:
            continue  # an indented block of code; below a point of a list it is text
        else:
            yield number, line
        listed = bool(re.match(r"\s*([-*]|\d+\.) ", line)) or (listed and line.startswith(" "))


def too_long(line: str) -> bool:
    """A line that is one long address cannot be shorter."""
    return len(line) > WIDTH and " " in line.strip().removeprefix("- ")


@pytest.mark.parametrize("path", written(), ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_end_where_a_screen_does(path):
    lines = [f"{number}: {len(line)}" for number, line in prose(path.read_text()) if too_long(line)]
    assert not lines, f"lines of more than {WIDTH} columns: {', '.join(lines)}"


def test_the_rule_sees_prose_and_nothing_else():
    """Guards against a rule that has come to pass everything over."""
    long = "word " * 30
    text = "\n".join([long, "```", long, "```", f"| {long} |", "", f"    {long}", "", "- a point", f"    {long}"])
    assert [number for number, line in prose(text) if too_long(line)] == [1, 10]
    assert not too_long("- https://" + 150 * "x")


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    hashes = [word for word in re.findall(r"\b[0-9a-f]{7,40}\b", text) if re.search(r"[a-f]", word)]
    assert not hashes, f"the README is no place for commits: {hashes}"


def test_scheduling_is_a_page():
    """What the page is for is lost when it grows: all of the room for load, read in three minutes."""
    lines = (ROOT / "docs" / "scheduling.md").read_text().split("\n")
    words = re.findall(r"[^\W_]+", "\n".join(line for line in lines if not line.startswith("|")))
    assert len(words) <= 600, f"{len(words)} words beside the tables"


def standing() -> dict[str, str]:
    """Number of a decision → what the index says of it: current, or by what it was replaced."""
    rows = re.findall(r"^\| \[(\d{3})\]\(([^)]+)\) \| .+ \| ([^|]+) \|$", (DECISIONS / "README.md").read_text(), re.M)
    assert len({number for number, _, _ in rows}) == len(rows), "a decision stands in the index twice"
    for number, name, _ in rows:
        assert name.startswith(number), f"{number} links to {name}"
        assert (DECISIONS / name).exists(), name
    return {number: status for number, _, status in rows}


def test_every_decision_is_in_the_index():
    assert set(standing()) == {path.name[:3] for path in DECISIONS.glob("[0-9]*.md")}


def test_a_decision_that_was_replaced_says_so_at_its_top():
    """Guards against a reader who takes a note for what holds."""
    for number, status in standing().items():
        assert re.fullmatch(r"current|current but for .+\(\d{3}\).*|superseded by \d{3}", status), f"{number}: {status}"
        (path,) = DECISIONS.glob(f"{number}-*.md")
        said = re.search(r"^\*\*(Superseded by|Replaced in part\*\* by) .+?(?=\n\n)", path.read_text(), re.M | re.S)
        kind = "superseded" if said and said[1] == "Superseded by" else "current but for" if said else "current"
        named = status if kind == "current" else status[: len(kind)]
        assert named == kind, f"{path.name}: the index says {status!r}"
        by = set(re.findall(r"\d{3}", status))
        assert by <= set(re.findall(r"\[(\d{3})\]", said[0] if said else "")), f"{path.name}: {status!r}"
