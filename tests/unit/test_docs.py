"""What the documentation says can be done: links lead somewhere, commands and flags exist, code compiles."""

from __future__ import annotations

import argparse
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from dspark_stream.commands.program import _build_parser
from unit.test_prose import ROOT, written

PAGES = [path for path in written() if path.parent.name != "drafters"]
CURRENT = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/*.md"))
"""What says how things are now; decisions and the changelog have the names of their day."""
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
FOREIGN = {"--bundle", "--build-arg", "--durations", "--merge", "--no-cache-dir", "--syntax-only"}
"""Flags of other programs, and of `python -m dspark_kernels.cpu`."""
OTHERS = {"curl", "git", "cd", "openssl"}


def fences(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of each fenced block."""
    for block in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S):
        yield block[1], block[2]


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return re.sub(r"(`+)(?!`).*?\1", "", text, flags=re.S)


# --- links ------------------------------------------------------------------------------------------------------


@cache
def anchors(path: Path) -> set[str]:
    """Ids of a page's headings, as forges make them."""
    seen: Counter[str] = Counter()
    found = set()
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.+?) *$", text, re.M):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(path: Path, text: str) -> list[str]:
    """Links of a page's text that lead nowhere."""
    links = re.findall(r"\]\(<?([^)\s>]+)>?\)|^\[[^\]]+\]: (\S+)|(?:src|href)=\"([^\"]+)\"", without_code(text), re.M)
    wrong = []
    for link in map("".join, links):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = (path.parent / target).resolve() if target else path
        found = there.exists() and there.is_relative_to(ROOT)
        if not found or (anchor and (there.suffix != ".md" or anchor not in anchors(there))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken(path, path.read_text()) == []


def test_the_rule_sees_links_that_lead_nowhere():
    page = ROOT / "docs" / "api.md"
    text = (
        "[a](nowhere.md) [b](operating.md#metrics) [c](operating.md#nothing) [d](#what-is-refused-and-why) `[e](e.md)`"
    )
    assert broken(page, f"{text} [f](../../outside.md) [g](https://example.org/)\n```\n[h](h.md)\n```\n") == [
        "nowhere.md",
        "operating.md#nothing",
        "../../outside.md",
    ]


def test_every_page_is_in_the_menu():
    """`make docs` would say so too, later."""
    shown = set(re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {path.name for path in ROOT.glob("docs/*.md")}
    made = {"index.md", "events/index.md", "decisions/README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert shown == pages | made


# --- commands ---------------------------------------------------------------------------------------------------


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a shell block, those of a pipe one by one; variables before a command are left out."""
    for line in block.replace("\\\n", " ").split("\n"):
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "|"]:
            if word not in ("|", "&&", ";"):
                words.append(word)
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


@cache
def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def complaint(command: list[str], capsys) -> str:
    """What is wrong with a command as far as this repository knows; empty: nothing."""
    program, *argv = command
    name = Path(program).name
    if name == "make":
        for word in argv:
            variable, given, _ = word.partition("=")
            known = rf"\$[({{](?:or \$\()?{variable}\b|\b{variable}\b *\?=" if given else rf"^{re.escape(word)}:"
            if not re.search(known, makefile(), re.M):
                return f"make knows no {variable}"
        return ""
    if name == "dspark-stream":
        try:
            _build_parser().parse_args(argv)
        except SystemExit as stopped:
            return capsys.readouterr().err if stopped.code else ""
        return ""
    if name == "python" and argv[0] != "-m":
        if not (ROOT / argv[0]).is_file():
            return f"there is no {argv[0]}"
        unknown = {flag for word in argv[1:] for flag in FLAG.findall(word)} - bench_flags(ROOT / argv[0])
        return f"{argv[0]} has no {unknown}" if unknown else ""
    return "" if name in OTHERS or name == "python" else f"what is {program}?"


def commands_of(program: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = (action for action in program._actions if isinstance(action, argparse._SubParsersAction))
    return subparsers.choices


@cache
def program_flags() -> frozenset[str]:
    parsers = [_build_parser(), *commands_of(_build_parser()).values()]
    return frozenset(flag for parser in parsers for action in parser._actions for flag in action.option_strings)


def bench_flags(script: Path) -> set[str]:
    """Flags that a bench names, or takes over from its helpers and from the program."""
    sources = [script, *(ROOT / "bench" / name for name in ("common.py", "own_service.py", "gpu_models.py"))]
    return {flag for source in sources for flag in FLAG.findall(source.read_text())} | program_flags()


def shell(path: Path) -> str:
    """What is to be typed on a page: its shell blocks, and lines set apart that are a command of ours."""
    text = path.read_text()
    blocks = [code for language, code in fences(text) if language == "sh"]
    apart = re.findall(r"^    ((?:python|dspark-stream|make) .+(?:(?<=\\)\n.+)*)$", text, re.M)
    return "\n".join([*blocks, *apart])


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_are_shown_are_understood(path, capsys):
    wrong = [(command, said) for command in commands(shell(path)) if (said := complaint(command, capsys))]
    assert not wrong


def test_commands_are_seen_at_all(capsys):
    """Guards against a rule that has come to pass everything over."""
    seen = [Path(command[0]).name for path in CURRENT for command in commands(shell(path))]
    assert Counter(seen)["dspark-stream"] > 10
    assert Counter(seen)["make"] > 4
    assert Counter(seen)["python"] > 4
    lines = (
        'make tset\nmake serve MODLE=x\ndspark-stream serve --prot 1\nmake serve MODEL=x | A=b dspark-stream chat "#"'
    )
    lines += "\npython bench/none.py\npython bench/edits.py --promts 3\npip install x"
    assert [bool(complaint(command, capsys)) for command in commands(lines)] == [True] * 3 + [False] * 2 + [True] * 3


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_and_targets_in_prose_exist(path, capsys):
    text = path.read_text()
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    flags = {flag for span in spans for flag in FLAG.findall(" ".join(span.split()))}
    benches = [flag for script in ROOT.glob("bench/*.py") for flag in FLAG.findall(script.read_text())]
    assert not flags - program_flags() - set(benches) - FOREIGN
    asked = [" ".join(span.split()) for span in spans if re.match(r"(make|dspark-stream)\s", span)]
    wrong = [(span, said) for span in asked for c in commands(span) if (said := complaint(c, capsys))]
    assert not wrong


@pytest.mark.parametrize("name", commands_of(_build_parser()))
def test_examples_of_the_help_are_understood(name, capsys):
    parser = commands_of(_build_parser())[name]
    lines = [line.strip() for line in parser.epilog.split("\n") if re.search(r"(^|\s)dspark-stream \w", line)]
    examples = [line for line in lines if re.match(r"([A-Z_]+=\S+ |echo .*\| |[a-z ]+\| )?dspark-stream ", line)]
    assert any(f"dspark-stream {name}" in line for line in examples)
    for command in commands("\n".join(examples)):
        if Path(command[0]).name == "dspark-stream":
            assert complaint(command, capsys) == "", command


# --- code -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_compiles(path):
    """`tests/wire/test_wire_docs.py` runs what is on the pages that a newcomer reads."""
    for language, code in fences(path.read_text()):
        if language == "python":
            compile(code, str(path), "exec")
        assert language in ("", "sh", "python", "json", "yaml", "js"), f"{path}: {language} is checked by nobody"
