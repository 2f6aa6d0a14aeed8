"""Settings: one table, argv over environment over defaults, and errors that name the flag, value and limit."""

import argparse
import re
from pathlib import Path

import pytest

from dspark_stream.config import Config, add_arguments, default_cache_dir, parse_bytes, resolve
from dspark_stream.errors import ConfigError

HOME = {"HOME": "/home/someone"}


def from_flags(*argv: str, environ: dict[str, str] | None = None) -> Config:
    parser = argparse.ArgumentParser()
    add_arguments(parser, ("model", "engine", "service"))
    return resolve(vars(parser.parse_args(argv)), environ if environ is not None else HOME).config


def test_defaults_are_those_of_the_struct():
    config = from_flags()
    assert config == Config(cache_dir=Path("/home/someone/.cache/dspark-stream"))
    assert (config.host, config.port, config.kv_memory) == ("127.0.0.1", 8000, 1 << 30)


def test_flags_win_over_environment_and_environment_over_defaults():
    environ = {**HOME, "DSPARK_PORT": "7001", "DSPARK_THREADS": "3"}
    config = from_flags("--port", "7002", environ=environ)
    assert (config.port, config.threads, config.max_num_seqs) == (7002, 3, 32)


def test_port_and_host_without_prefix_are_read_after_ours():
    assert from_flags(environ={**HOME, "PORT": "7001", "HOST": "::1"}).host == "::1"
    assert from_flags(environ={**HOME, "PORT": "7001", "DSPARK_PORT": "7002"}).port == 7002


def test_an_empty_variable_is_as_good_as_none():
    assert from_flags(environ={**HOME, "DSPARK_PORT": "", "PORT": " "}).port == 8000


def test_every_setting_has_a_flag_and_a_variable_that_do_the_same():
    parser = argparse.ArgumentParser()
    add_arguments(parser, ("model", "engine", "service"))
    samples = {"schedule": "fixed:2", "kv_memory": "2MiB", "cache_dir": "/x", "device": "cpu", "dtype": "float16"}
    samples |= {
        "calibration": "none",
        "cpu_kernels": "off",
        "cuda_graphs": "off",
        "draft_quant": "int8",
        "target_quant": "nf4",
    }
    samples |= {"slow_reader_bytes": "2MiB", "queue_memory": "64MiB", "open_metrics": "on"}
    samples |= {"access_log": "off", "log_format": "json", "log_level": "debug"}
    for action in parser._actions:
        if action.dest in ("help", "speculative_config"):
            continue
        kind = type(getattr(Config(), action.dest))
        text = samples.get(action.dest, "7" if kind in (int, float) else "name")
        if kind is bool:
            text = "off" if getattr(Config(), action.dest) else "on"
        variable = re.search(r"\[(DSPARK_\w+)\]", action.help)[1]
        by_flag = resolve(vars(parser.parse_args([action.option_strings[0], text])), HOME)
        by_variable = resolve({}, {**HOME, variable: text})
        assert by_flag.config == by_variable.config != Config(cache_dir=default_cache_dir(HOME)), action.dest
        assert by_variable.sources == {action.dest: variable}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--port", "eighty"), ("--port", "'eighty'", "whole number")),
        (("--port", "65536"), ("--port", "65536", "0 to 65535")),
        (("--max-num-seqs", "0"), ("--max-num-seqs", "0 is out of range", "1 to 4096")),
        (("--prefill-budget-ms", "nan"), ("--prefill-budget-ms", "nan is out of range")),
        (("--shutdown-timeout", "-1"), ("--shutdown-timeout", "-1")),
        (("--device", "tpu"), ("--device", "'tpu'", "auto, cpu, cuda")),
        (("--schedule", "fixed:65"), ("--schedule", "fixed:65", "0 to 64")),
        (("--schedule", "sometimes"), ("--schedule", "'sometimes'", "adaptive")),
        (("--max-queue", "true"), ("--max-queue", "'true'", "whole number")),
        (("--kv-memory", "1XiB"), ("--kv-memory", "'1XiB'", "512MiB")),
        (("--kv-memory", "1KiB"), ("--kv-memory", "1KiB is out of range", "1MiB to")),
    ],
)
def test_a_bad_value_names_flag_value_and_limit(argv, words):
    with pytest.raises(ConfigError) as caught:
        from_flags(*argv)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_variable_is_named_as_the_variable():
    with pytest.raises(ConfigError, match=r"DSPARK_MAX_QUEUE: 'many' is not a whole number"):
        from_flags(environ={"DSPARK_MAX_QUEUE": "many"})


def test_a_switch_is_on_or_off():
    assert from_flags("--exit-on-engine-failure", "off").exit_on_engine_failure is False
    off = {"DSPARK_EXIT_ON_ENGINE_FAILURE": "off", **HOME}
    assert from_flags("--exit-on-engine-failure", "on", environ=off).exit_on_engine_failure is True
    for text, value in (("on", True), ("TRUE", True), ("1", True), ("off", False), ("false", False), ("0", False)):
        config = from_flags(environ={"DSPARK_EXIT_ON_ENGINE_FAILURE": text, **HOME})
        assert config.exit_on_engine_failure is value
    with pytest.raises(ConfigError, match=r"DSPARK_EXIT_ON_ENGINE_FAILURE: 'maybe' is not one of on, off"):
        from_flags(environ={"DSPARK_EXIT_ON_ENGINE_FAILURE": "maybe"})


SWITCHES = ("open_metrics", "allow_control_tokens", "exit_on_engine_failure", "access_log")


@pytest.mark.parametrize("name", SWITCHES)
def test_all_switches_are_of_one_kind(name):
    """Guards against words that one switch takes and the next does not."""
    for text, value in (("on", True), ("True", True), ("1", True), ("off", False), ("FALSE", False), ("0", False)):
        assert getattr(from_flags("--" + name.replace("_", "-"), text), name) is value
        assert getattr(from_flags(environ={"DSPARK_" + name.upper(): text, **HOME}), name) is value


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_takes_nothing_else_for_its_value(name, capsys):
    """Guards against a switch that eats the model's name which stands behind it."""
    flag = "--" + name.replace("_", "-")
    with pytest.raises(SystemExit):
        from_flags(flag)
    assert "expected one argument" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"{flag}: 'qwen3-0.6b' is not one of on, off"):
        from_flags(flag, "qwen3-0.6b")


def test_a_host_may_stand_in_brackets():
    assert from_flags("--host", "[::1]").host == from_flags("--host", "::1").host == "::1"


def test_an_unknown_variable_of_ours_is_an_error_with_a_guess():
    with pytest.raises(ConfigError, match=r"DSPARK_MAX_NUM_SEQ: .* did you mean DSPARK_MAX_NUM_SEQS"):
        from_flags(environ={"DSPARK_MAX_NUM_SEQ": "3"})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 1 << 30),
        ("512MiB", 512 << 20),
        ("2G", 2 << 30),
        ("2g", 2 << 30),
        ("2GB", 2_000_000_000),
        ("1.5KiB", 1536),
        ("4096", 4096),
        ("4096B", 4096),
        (" 8 MiB ", 8 << 20),
        ("1T", 1 << 40),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "1iB", "-1", "1 2", "1e9", "0x10"])
def test_what_is_not_a_size(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


def test_lists_repeat_as_flags_and_take_commas_as_variables():
    config = from_flags("--allowed-host", "a", "--allowed-host", "b:81")
    assert config.allowed_host == ("a", "b:81")
    config = from_flags(environ={"DSPARK_ALLOWED_ORIGIN": "https://a.example, https://b.example"})
    assert config.allowed_origin == ("https://a.example", "https://b.example")


def test_speculative_config_stands_for_drafter_quantisation_and_schedule():
    text = '{"method": "dspark", "model": "./d", "quantization": "int8", "num_speculative_tokens": 3}'
    config = from_flags("--speculative-config", text)
    assert (config.drafter, config.draft_quant, config.schedule) == ("./d", "int8", "fixed:3")
    assert config.schedule == "fixed:3"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"tokens": 3}', "tokens"),
        ('{"method": "eagle"}', "method"),
        ('{"num_speculative_tokens": -1}', "num_speculative_tokens"),
        ("{", "speculative-config"),
        ("[]", "speculative-config"),
    ],
)
def test_a_bad_speculative_config_says_where(text, word):
    with pytest.raises(ConfigError, match=word):
        from_flags("--speculative-config", text)


def test_speculative_config_and_a_flag_that_contradicts_it():
    with pytest.raises(ConfigError, match=r"--schedule says adaptive, but --speculative-config says fixed:2"):
        from_flags("--schedule", "adaptive", "--speculative-config", '{"num_speculative_tokens": 2}')
    # Between layers the higher one wins, as for every setting.
    environ = {**HOME, "DSPARK_SPECULATIVE_CONFIG": '{"num_speculative_tokens": 2}'}
    assert from_flags("--schedule", "adaptive", environ=environ).schedule == "adaptive"


def test_the_cache_folder_follows_xdg():
    assert default_cache_dir({"XDG_CACHE_HOME": "/c", "HOME": "/h"}) == Path("/c/dspark-stream")
    assert default_cache_dir({"XDG_CACHE_HOME": "relative", "HOME": "/h"}) == Path("/h/.cache/dspark-stream")


def test_the_printed_list_names_sources_and_keeps_the_key():
    resolved = resolve({"kv_memory": "512MiB"}, {**HOME, "DSPARK_API_KEY": "secret-key"})
    text = "\n".join(resolved.lines())
    assert "secret-key" not in text
    assert re.search(r"api_key +\*{4} +\(DSPARK_API_KEY\)", text)
    assert re.search(r"kv_memory +512MiB +\(--kv-memory\)", text)
    assert re.search(r"port +8000$", text, re.MULTILINE)
