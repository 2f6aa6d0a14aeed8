"""The command line: what it reads, what it prints where, and how it exits."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from dspark_stream.commands import common, serve
from dspark_stream.commands.program import main
from dspark_stream.config import Config
from dspark_stream.decoding.calibration import load_calibration
from dspark_stream.errors import ConfigError, InternalError, ModelLoadError
from dspark_stream.load.costs import CapacityCurve
from dspark_stream.models.names import MODELS
from dspark_stream.types import RecommendedSampling
from fakes import FakeEngine, FakeTokenizer, Script, model_info

SEVEN_WORDS = Script(tokens=tuple(f"w{i} " for i in range(7)), rounds=(3, 1))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def loaded(monkeypatch):
    """Put a fake engine where the models would be; returns the configurations that were asked for."""
    configs: list[Config] = []

    def load(config, *, quiet=False):
        configs.append(config)
        engine = FakeEngine(SEVEN_WORDS, info=model_info(draft_quant=config.draft_quant))
        return engine, FakeTokenizer()

    monkeypatch.setattr(common, "load", load)
    for name in [name for name in os.environ if name.startswith("DSPARK_")]:
        monkeypatch.delenv(name)
    return configs


def write_prompts(path: Path, count: int) -> Path:
    lines = [
        {"domain": "chat", "set": "s", "messages": [{"role": "user", "content": f"question {i}"}], "more": 1}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# --- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["COMMAND"]),
        (["sing"], ["sing"]),
        (["generate"], ["--prompt", "--input-ids", "stdin"]),
        (["generate", ""], ["empty", "--prompt"]),
        (["generate", "a", "--prompt", "b"], ["--prompt", "PROMPT"]),
        (["generate", "a", "--input-ids", "1"], ["--input-ids", "PROMPT"]),
        (["generate", "--prompt", "a", "--input-ids", "1"], ["--input-ids", "--prompt"]),
        (["generate", "a", "--color", "red"], ["--color", "auto", "always", "never"]),
        (["generate", "--prompt", "a", "--temp", "1"], ["--temp", "generate --help"]),
        (["serve", "--prot", "80"], ["--prot", "did you mean --port?", "serve --help"]),
        (["chat", "Why", "is", "it?"], ["is it?", "a question of several words has to be in quotes"]),
        (["generate", "--prompt", "a", "--temperature", "nan"], ["--temperature", "nan", "0 to 2"]),
        (["generate", "--prompt", "a", "--temperature", "-1"], ["--temperature", "-1"]),
        (["generate", "--prompt", "a", "--max-tokens", "0"], ["--max-tokens", "0"]),
        (["generate", "--prompt", "a", "--max-tokens", "1.5"], ["--max-tokens", "1.5", "whole number"]),
        (["generate", "--prompt", "a", "--stop", ""], ["--stop"]),
        (["generate", "--input-ids", "1,x"], ["--input-ids", "1,x"]),
        (["generate", "--input-ids", "-1"], ["--input-ids"]),
        (["generate", "--input-ids", ","], ["--input-ids"]),
        (["generate", "--prompt", "a", "--schedule", "often"], ["--schedule", "often"]),
        (["eval"], ["--prompts"]),
        (["eval", "--prompts", "/no/such.jsonl"], ["/no/such.jsonl", "No such file", "--prompts"]),
        (["profile", "--plot", "curve.jpeg"], ["--plot", "curve.jpeg", ".svg, .png"]),
        (["train"], ["--minutes", "--steps", "dspark-stream train --target MODEL --minutes 60"]),
        (["train", "--minutes", "1", "--layers", "99"], ["--layers", "99", "1 … 32"]),
        (["train", "--minutes", "-1"], ["--minutes", "-1"]),
        (["serve", "a", "--model", "b"], ["'a'", "'b'"]),
        (["serve", "--port", "x"], ["--port", "'x'"]),
        (["serve", "--host", "0.0.0.0"], ["0.0.0.0", "key"]),
        (["serve", "--host", "a..b", "--api-key", "k"], ["a..b", "host name"]),
        (["serve", "--host", "a" * 70, "--api-key", "k"], ["a" * 70, "host name"]),
        (["serve", "--port", "0", "--api-key-file", "/no/such"], ["/no/such", "No such file"]),
        (["serve", "--allow-control-tokens", "qwen3-0.6b"], ["--allow-control-tokens", "'qwen3-0.6b'", "on, off"]),
    ],
)
def test_a_mistake_is_one_line_and_code_2(argv, words, loaded, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal())
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert code == 2
    assert last.startswith("dspark-stream: error: ")
    assert all(word in last for word in words), last
    assert said.out == ""
    assert loaded == []


def test_an_ipv6_address_may_stand_in_brackets(monkeypatch):
    """Guards against the form that URLs have, which no socket takes."""
    asked = []
    monkeypatch.setattr(serve, "check_port", lambda host, port: asked.append(host))

    def load(*_, **__):
        raise ModelLoadError("far enough")

    monkeypatch.setattr(common, "load", load)
    assert main(["serve", "--host", "[::1]", "--port", "0"]) == 2
    assert asked == ["::1"]


def test_a_port_that_is_taken_is_told_before_loading(loaded, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port]) == 2
    assert f"port {port}: Address already in use" in capsys.readouterr().err
    assert loaded == []


def test_an_error_names_the_flag_that_mends_it(loaded, monkeypatch, capsys):
    """Guards against a message in the words of whoever raised it, who knows the setting and no command line."""
    told = [
        (ConfigError("kv_memory of 1 MiB is too little", param="kv_memory"), " (--kv-memory)"),
        (ModelLoadError("there is none; see --model", param="model"), ""),
        (ConfigError("of no flag", param="architectures"), ""),
    ]
    for error, flag in told:

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(common, "load", fail)
        assert main(["generate", "a"]) == 2
        assert capsys.readouterr().err == f"dspark-stream: error: {error}{flag}\n"


@pytest.mark.parametrize(("error", "code"), [(ModelLoadError("broken"), 2), (InternalError("ours"), 1)])
def test_whose_fault_it_is_shows_in_the_code(error, code, loaded, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(common, "load", fail)
    assert main(["generate", "--prompt", "a"]) == code
    assert capsys.readouterr().err == f"dspark-stream: error: {error}\n"


@pytest.mark.parametrize(
    "command", ["", "serve", "chat", "generate", "models", "eval", "profile", "reproduce", "train"]
)
def test_help_is_there_and_instant(command):
    script = (
        "import sys\nfrom dspark_stream.commands.program import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "heavy = {'torch', 'transformers', 'aiohttp', 'websockets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    argv = [sys.executable, "-c", script, *command.split(), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: dspark-stream" in done.stdout
    if command:
        assert "example" in done.stdout


# --- generate ------------------------------------------------------------------------------------------------


def test_generate_prints_text_on_stdout_and_figures_on_stderr(loaded, capsys):
    assert main(["generate", "hello"]) == 0
    said = capsys.readouterr()
    assert said.out == "w0 w1 w2 w3 w4 w5 w6 \n"
    assert said.err == "[57 % of 7 tokens guessed ahead, 2.33 tokens a round, 3000.0 tokens a second]\n"
    assert main(["generate", "hello", "--max-tokens", "2"]) == 0
    assert ", cut by --max-tokens]" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["generate"], ["generate", "-"], ["generate", "--prompt", "-"]])
def test_generate_reads_a_pipe(argv, loaded, monkeypatch, capsys):
    engine, tokenizer = FakeEngine(SEVEN_WORDS), FakeTokenizer()
    monkeypatch.setattr(common, "load", lambda *_, **__: (engine, tokenizer))
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert main(argv) == 0
    assert tokenizer.chats == [[("user", "two\nlines")]]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(argv) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_generate_reads_nothing_that_it_needs_not(loaded, monkeypatch, capsys):
    """Guards against a script that hangs on a stdin which nobody closes."""
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", "hello"]) == 0
    assert main(["generate", "--input-ids", "1"]) == 0


def test_generate_tints_what_was_guessed_ahead(loaded, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "vt100")
    monkeypatch.delenv("COLORTERM", raising=False)
    assert main(["generate", "hello", "--color", "always"]) == 0
    assert capsys.readouterr().out.startswith("\x1b[4mw0 w1 \x1b[0mw2 w3 \x1b[4mw4 w5 \x1b[0mw6 ")
    assert main(["generate", "hello"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_generate_json_is_one_object_with_these_fields(loaded, capsys):
    assert main(["generate", "--prompt", "hello", "--max-tokens", "5", "--json"]) == 0
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert set(answer) == {
        "output_ids", "text", "finish_reason", "accepted_length", "tokens_per_s", "rounds", "usage"
    }  # fmt: skip
    assert answer["output_ids"] == [0, 1, 2, 3, 4]
    assert answer["text"] == "w0 w1 w2 w3 w4 "
    assert answer["finish_reason"] == "length"
    assert answer["accepted_length"] == pytest.approx(1 + 2 / 3)
    assert answer["tokens_per_s"] == pytest.approx(4 / 0.002)
    assert [set(one) for one in answer["rounds"]] == 3 * [
        {"start", "anchor", "draft_tokens", "scheduled", "accepted", "bonus", "confidence"}
    ]
    assert [one["accepted"] for one in answer["rounds"]] == [2, 0, 0]
    assert said.err == ""


def test_generate_passes_everything_on(loaded, monkeypatch, capsys):
    engine = FakeEngine(SEVEN_WORDS)
    monkeypatch.setattr(common, "load", lambda *_, **__: (engine, None))
    argv = "generate --input-ids 5,6,7 --mode plain --verification coupled --temperature 0.5 --top-p 0.9"
    argv += " --top-k 3 --min-p 0.1 --seed 9 --stop x --stop y --ignore-eos --max-tokens 2 --json"
    assert main(argv.split()) == 0
    (request,) = engine.submitted
    assert request.prompt_ids == (5, 6, 7)
    assert (request.mode, request.verification, request.record_rounds) == ("plain", "coupled", True)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 3, 0.1)
    assert (sampling.seed, sampling.stop, sampling.ignore_eos, sampling.max_tokens) == (9, ("x", "y"), True, 2)


@pytest.mark.parametrize(
    ("argv", "recommended", "expected"),
    [
        ("", {"temperature": 0.7, "top_p": 0.8, "top_k": 20}, (0.7, 0.8, 20)),
        ("--temperature 0", {"temperature": 0.7, "top_p": 0.8, "top_k": 20}, (0.0, 0.8, 20)),
        ("--top-p 1 --top-k 0", {"temperature": 0.7, "top_p": 0.8, "top_k": 20}, (0.7, 1.0, 0)),
        ("", {"temperature": 0.0}, (0.0, 1.0, 0)),
        ("", {}, (0.0, 1.0, 0)),
    ],
)
def test_generate_takes_what_is_recommended_where_nothing_is_said(argv, recommended, expected, loaded, monkeypatch):
    engine = FakeEngine(SEVEN_WORDS, info=model_info(sampling=RecommendedSampling(**recommended)))
    monkeypatch.setattr(common, "load", lambda *_, **__: (engine, FakeTokenizer()))
    assert main(["generate", "--prompt", "hello", "--json", *argv.split()]) == 0
    sampling = engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == expected


def test_eval_goes_by_its_own_temperature(loaded, monkeypatch, tmp_path, capsys):
    engine = FakeEngine(SEVEN_WORDS, info=model_info(sampling=RecommendedSampling(temperature=0.7, top_k=20)))
    monkeypatch.setattr(common, "load", lambda *_, **__: (engine, FakeTokenizer()))
    assert main(["eval", "--prompts", str(write_prompts(tmp_path / "p.jsonl", 2)), "--json"]) == 0
    assert {(r.sampling.temperature, r.sampling.top_p, r.sampling.top_k) for r in engine.submitted} == {(0.0, 1.0, 0)}


@pytest.mark.parametrize("command", ["generate --prompt a", "eval --prompts x", "chat"])
def test_people_have_one_range_of_temperatures(command, loaded, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--temperature", "2.1"])
    assert "--temperature: 2.1 is out of range: it must be from 0 to 2" in capsys.readouterr().err


# --- models --------------------------------------------------------------------------------------------------


def test_models_lists_what_has_a_name_and_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    small, big = MODELS["smollm2-135m"], MODELS["qwen2.5-coder-0.5b"]
    (tmp_path / "models").mkdir()
    for name, size in ((small.file_name, small.size), (f"{big.file_name}.parts", 178_257_920)):
        with (tmp_path / "models" / name).open("wb") as file:
            file.truncate(size)
    assert main(["models", "--json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)["models"]}
    assert list(listed) == list(MODELS)
    assert [name for name, one in listed.items() if one["default"]] == ["qwen2.5-coder-0.5b"]
    one = listed["smollm2-135m"]
    assert (one["path"], one["bytes"]) == (str(tmp_path / "models" / small.file_name), small.size)
    assert (one["drafter"], one["licence"]) == ("smollm2-135m-instruct", "Apache-2.0")
    assert one["sampling"] == {"temperature": 0.2, "top_p": 0.9, "top_k": None}
    assert (listed[big.name]["path"], listed[big.name]["arrived_bytes"]) == (None, 178_257_920)

    assert main(["models"]) == 0
    said = capsys.readouterr().out
    assert "qwen2.5-coder-0.5b  491 MB (default)" in said
    assert "fetched   178 MB of it" in said
    assert f"fetched   {tmp_path}/models/{small.file_name}" in said
    assert "sampling  temperature 0.7, top-p 0.8, top-k 20" in said
    assert "Gemma Terms of Use" in said
    assert "drafter   none" in said


def test_a_prompt_for_a_model_without_a_tokenizer(loaded, monkeypatch, capsys):
    monkeypatch.setattr(common, "load", lambda *_, **__: (FakeEngine(), None))
    assert main(["generate", "--prompt", "hello"]) == 2
    assert "--input-ids" in capsys.readouterr().err


def test_a_stream_that_fails_is_our_fault(loaded, monkeypatch, capsys):
    engine = FakeEngine(Script(fail_after_rounds=1))
    monkeypatch.setattr(common, "load", lambda *_, **__: (engine, FakeTokenizer()))
    assert main(["generate", "--prompt", "hello"]) == 1
    assert "failed on purpose" in capsys.readouterr().err


# --- profile and reproduce -----------------------------------------------------------------------------------


def test_profile_prints_what_rounds_cost_and_draws_it(loaded, monkeypatch, tmp_path, capsys):
    asked = []

    def load(config, *, quiet=False, measure_again=False):
        asked.append(measure_again)
        engine = FakeEngine()
        engine.capacity = CapacityCurve(tokens=[1, 4], verify_ms=[5.0, 8.0], streams=[1], draft_ms=[1.0], gamma=1)
        return engine, FakeTokenizer()

    monkeypatch.setattr(common, "load", load)
    picture = tmp_path / "new" / "curve.svg"
    assert main(["profile", "--again", "--plot", str(picture)]) == 0
    assert "2.00" in capsys.readouterr().out  # a token of four
    assert picture.read_text().startswith("<svg")
    if find_spec("PIL") is not None:
        assert main(["profile", "--plot", str(picture.with_suffix(".PNG"))]) == 0
        assert picture.with_suffix(".PNG").read_bytes().startswith(b"\x89PNG")
        asked.pop()
        capsys.readouterr()
    assert main(["profile", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verify_ms"] == [5.0, 8.0]
    assert asked == [True, False]
    (tmp_path / "folder.svg").mkdir()
    assert main(["profile", "--plot", str(tmp_path / "folder.svg")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_reproduce_without_a_drafter_says_so(loaded, monkeypatch, capsys):
    engine = FakeEngine(info=model_info(gamma=0, drafter=None))
    monkeypatch.setattr(common, "load", lambda *_, **__: (engine, FakeTokenizer()))
    assert main(["reproduce", "--quick"]) == 2
    assert "no drafter" in capsys.readouterr().err


# --- eval ----------------------------------------------------------------------------------------------------


def test_eval_json_has_each_file_and_all(loaded, tmp_path, capsys):
    one, two = write_prompts(tmp_path / "one.jsonl", 3), write_prompts(tmp_path / "two.jsonl", 5)
    assert main(["eval", "--prompts", str(one), str(two), "--limit", "4", "--streams", "2", "--json"]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert said.err == ""
    assert set(report["files"]) == {str(one), str(two)}
    asked = {"accepted_length", "acceptance_by_position", "tokens_per_s_user", "tokens_per_s_total", "rounds"}
    for figures in (*report["files"].values(), report["all"]):
        assert asked | {"calibration_error"} <= set(figures)
    assert [report["files"][str(path)]["prompts"] for path in (one, two)] == [3, 4]
    # Seven words are rounds of 3, 1 and 3: two drafts accepted, none, and two.
    assert report["all"]["rounds"] == 3 * 7
    assert report["all"]["accepted_length"] == pytest.approx(1 + 4 / 3)
    assert report["engine"]["model"] == "fake-135m"
    assert report["plan"]["streams"] == 2
    assert report["unquantised"] is None


def test_eval_prints_a_table(loaded, tmp_path, capsys):
    one, two = write_prompts(tmp_path / "one.jsonl", 2), write_prompts(tmp_path / "two.jsonl", 1)
    assert main(["eval", "--prompts", str(one), str(two)]) == 0
    said = capsys.readouterr()
    header, *rows = said.out.splitlines()
    assert "accepted length" in header
    assert [row.split()[:2] for row in rows] == [["one.jsonl", "2"], ["two.jsonl", "1"], ["all", "3"]]
    assert "two.jsonl: 100%" in said.err


def test_eval_tells_files_of_one_name_apart(loaded, tmp_path, capsys):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(str(write_prompts(tmp_path / folder / "one.jsonl", 2)))
    assert main(["eval", "--prompts", *paths]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:]] == [*paths, "all"]


def test_eval_goes_on_with_follow_ups(loaded, tmp_path, capsys):
    path = tmp_path / "chat.jsonl"
    turn = {"messages": [{"role": "user", "content": "one"}]}
    path.write_text(json.dumps(turn | {"follow_ups": ["two", "three"]}) + "\n" + json.dumps(turn) + "\n")
    assert main(["eval", "--prompts", str(path), "--turns", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["all"]
    assert figures["prompts"] == 3
    assert {turn: part["rounds"] for turn, part in figures["by_turn"].items()} == {"1": 6, "2": 3}


def test_eval_passes_over_a_turn_that_is_too_long(monkeypatch, tmp_path, capsys):
    """One conversation grows past the model's positions; the others, and the rest of the run, go on."""
    engines = (FakeEngine(SEVEN_WORDS, info=model_info(max_model_len=100)), FakeTokenizer())
    monkeypatch.setattr(common, "load", lambda config, *, quiet=False: engines)
    path = tmp_path / "chat.jsonl"
    turns = [["short", "short"], ["x" * 60, "never asked"], ["short", "y" * 60]]
    lines = [{"messages": [{"role": "user", "content": "one"}], "follow_ups": f} for f in turns]
    lines.append({"messages": [{"role": "user", "content": "z" * 80}]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["eval", "--prompts", str(path), "--turns", "3", "--max-tokens", "20"]
    assert main([*argv, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["all"]
    assert figures["prompts"] == 3 + 2 + 1
    assert figures["passed_over"] == 3
    assert list(figures["by_turn"]) == ["1", "2", "3"]
    engines = (FakeEngine(SEVEN_WORDS, info=model_info(max_model_len=100)), FakeTokenizer())
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert "1 conversations end after turn 1" in said
    assert "1 conversations end after turn 2" in said
    assert "1 prompts are passed over, the first of them prompt 4" in said
    engines = (FakeEngine(SEVEN_WORDS, info=model_info(max_model_len=100)), FakeTokenizer())
    assert main([*argv[:-1], "100"]) == 2
    assert "max_model_len is 100" in capsys.readouterr().err


def test_eval_of_a_quantised_drafter_tells_what_it_costs(loaded, tmp_path, capsys):
    path = write_prompts(tmp_path / "one.jsonl", 2)
    assert main(["eval", "--prompts", str(path), "--draft-quant", "int8"]) == 0
    assert [config.draft_quant for config in loaded] == ["int8", "none"]
    assert "quantisation: accepted length" in capsys.readouterr().out
    assert main(["eval", "--prompts", str(path), "--draft-quant", "int8", "--no-quant-cost"]) == 0
    assert len(loaded) == 3


def test_eval_makes_room_for_its_streams(loaded, tmp_path):
    path = write_prompts(tmp_path / "one.jsonl", 1)
    main(["eval", "--prompts", str(path), "--streams", "40"])
    main(["eval", "--prompts", str(path), "--streams", "4"])
    assert [config.max_num_seqs for config in loaded] == [40, 32]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "truncated"),
        ('{"domain": "x"}', "messages"),
        ('{"messages": "hello"}', "messages"),
        ('{"messages": []}', "end with a turn of the user"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "end with a turn of the user"),
        ('{"messages": [{"role": "user"}]}', "content"),
    ],
)
def test_eval_names_the_line_that_cannot_be_read(line, words, loaded, tmp_path, capsys):
    path = write_prompts(tmp_path / "bad.jsonl", 2)
    path.write_text(path.read_text() + "\n" + line + "\n")
    assert main(["eval", "--prompts", str(path)]) == 2
    said = capsys.readouterr().err
    assert "bad.jsonl:4: " in said
    assert words in said
    # Lines past the limit are not read.
    assert main(["eval", "--prompts", str(path), "--limit", "2"]) == 0


# --- calibrate -----------------------------------------------------------------------------------------------


@pytest.fixture
def confident(monkeypatch):
    """A drafter's config without a file, and few rounds are enough."""
    config = SimpleNamespace(enable_confidence_head=True)
    monkeypatch.setattr("dspark_stream.models.checkpoint.read_config", lambda folder: config)
    monkeypatch.setattr("dspark_stream.measure.calibrate.LEAST_ROUNDS", 9)
    return config


def test_calibrate_verifies_everything_three_ways_and_writes_beside_the_drafter(loaded, confident, tmp_path, capsys):
    path = write_prompts(tmp_path / "one.jsonl", 4)
    argv = ["calibrate", "--prompts", str(path), "--drafter", str(tmp_path), "--limit", "3"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    (config,) = loaded
    assert (config.calibration, config.schedule) == ("none", "fixed:64")
    calibration = load_calibration(tmp_path)
    # Seven words are rounds of 3, 1 and 3: of two drafts in three 0.9 was promised for each.
    assert len(calibration.greedy) == len(calibration.coupled) == 4
    assert calibration.greedy[0] > 1.2
    assert calibration.greedy_bias[0] < -0.1
    assert said.count("9 rounds, accepted length 2.33") == 3
    assert main([*argv, "--json", "--out", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_calibrate_leaves_out_what_the_drafter_was_trained_on(monkeypatch, confident, tmp_path, capsys):
    engine, tokenizer = FakeEngine(SEVEN_WORDS), FakeTokenizer()
    monkeypatch.setattr(common, "load", lambda config, *, quiet=False: (engine, tokenizer))
    path = write_prompts(tmp_path / "one.jsonl", 6)
    asked = [tokenizer.encode_chat([("user", f"question {i}")]) for i in range(6)]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"prompt_ids": asked[i], "answer_ids": [1]}) + "\n" for i in (0, 2)))
    argv = ["calibrate", "--prompts", str(path), "--drafter", str(tmp_path), "--limit", "3"]
    assert main([*argv, "--unseen-by", str(answers)]) == 0
    assert [list(r.prompt_ids) for r in engine.submitted] == [asked[1], asked[3], asked[4]] * 3
    answers.write_text("no answers\n")
    assert main([*argv, "--unseen-by", str(answers)]) == 2
    assert "line 1" in capsys.readouterr().err


def test_calibrate_leaves_alone_what_it_has_seen_too_little_of(loaded, confident, tmp_path, capsys):
    path = write_prompts(tmp_path / "one.jsonl", 2)
    assert main(["calibrate", "--prompts", str(path), "--drafter", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "6 rounds are too few" in said
    assert "nothing was written" in said
    assert load_calibration(tmp_path) is None


def test_calibrate_needs_a_confidence_head(loaded, confident, tmp_path, capsys):
    confident.enable_confidence_head = False
    path = write_prompts(tmp_path / "one.jsonl", 1)
    assert main(["calibrate", "--prompts", str(path), "--drafter", str(tmp_path)]) == 2
    assert "no confidence head" in capsys.readouterr().err


def test_calibrate_needs_a_drafter(loaded, tmp_path, capsys):
    path = write_prompts(tmp_path / "one.jsonl", 1)
    assert main(["calibrate", "--prompts", str(path), "--drafter", "none"]) == 2
    assert "--drafter" in capsys.readouterr().err


# --- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_serve_can_be_stopped_while_it_loads(number, code, tmp_path):
    script = (
        "import signal, sys, time\nfrom dspark_stream.commands import common, program\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "def load(config, **_):\n"
        "    try:\n        print('loading', flush=True); time.sleep(60)\n"
        "    finally: print('cleared up', flush=True)\n"
        "common.load = load\n"
        "sys.exit(program.main(['serve', '--port', '0']))"
    )
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "loading\n"
        begun = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == "cleared up\n"
    assert "Traceback" not in err
    assert time.monotonic() - begun < 5
