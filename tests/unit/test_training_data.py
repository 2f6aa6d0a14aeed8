"""Prompts, answers and plans: what is read, what is refused in words, and what a kill or a full disk leaves."""

import contextlib
import importlib.util
import io
import json
from collections import Counter
from pathlib import Path

import pytest

from disk import files_no_larger_than
from dspark_stream.console import SILENT, Progress
from dspark_stream.engine.local import LocalEngine
from dspark_stream.errors import ConfigError, InternalError, InvalidRequestError
from dspark_stream.training.answering import (
    OWN_DOMAIN,
    OWN_TEMPERATURE,
    Scribe,
    given_prompts,
    plan_questions,
    read_files,
    take_up,
    usable,
)
from dspark_stream.training.answers import Answer, answer_line, draft_vocabulary, read_answers, split_answers
from dspark_stream.training.initial import default_taps, pick_mask_token
from dspark_stream.training.plan import TrainPlan, alone, settle
from dspark_stream.training.writers import EngineWriter, Written, choose_writer
from fakes import FakeEngine, FakeTokenizer, Script

VOCAB = 100


def plan(**values):
    return TrainPlan(**({"answers": "a", "steps": 1} | values))


# --- answers files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [True, False])
def test_an_answer_survives_its_line(tmp_path, held_out):
    answer = Answer((1, 2), (3, 4, 5), "math", 1.0, held_out, "engine")
    line = answer_line(answer, index=7)
    assert json.loads(line)["index"] == 7
    assert read_answers(answers_file(tmp_path, line), VOCAB) == [answer]


def answers_file(tmp_path, text):
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    return path


LINE = answer_line(Answer((1, 2), (3, 4, 5)))


def test_an_answers_file_cut_in_half_keeps_its_whole_lines(tmp_path):
    path = answers_file(tmp_path, LINE * 3 + LINE[:20])
    said = io.StringIO()
    assert len(read_answers(path, VOCAB, progress=Progress(said))) == 3
    assert "line 4 was cut off" in said.getvalue()


def test_answers_without_tokens_are_left_out_and_counted(tmp_path):
    path = answers_file(tmp_path, LINE + answer_line(Answer((1,), ())) * 2)
    said = io.StringIO()
    assert len(read_answers(path, VOCAB, progress=Progress(said))) == 1
    assert "2 answers without tokens" in said.getvalue()


def test_lines_end_at_newlines_and_nowhere_else(tmp_path):
    further = LINE.replace("{", '{"note": "a\u2028b\x85c", ', 1)
    assert len(read_answers(answers_file(tmp_path, further * 2), VOCAB)) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (LINE[:20] + "\n", "line 2"),
        ('{"prompt_ids": [1]}\n', "answer_ids"),
        ('{"prompt_ids": [1], "answer_ids": [100]}\n', "outside the target's vocabulary"),
        ('{"prompt_ids": [1], "answer_ids": ["x"]}\n', "line 2"),
        ("[]\n", "not a JSON object"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, said):
    with pytest.raises(ConfigError, match=said):
        read_answers(answers_file(tmp_path, LINE + line + LINE), VOCAB)


def test_no_file_and_nothing_in_it(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_answers(tmp_path / "none.jsonl", VOCAB)
    with pytest.raises(ConfigError, match="no answer"):
        read_answers(answers_file(tmp_path, ""), VOCAB)


def test_a_prompt_is_never_on_both_sides():
    answers = [Answer((p,), (1, 2), "ab"[p % 2], t) for p in range(40) for t in (0.0, 1.0)]
    split = split_answers(answers, 4, seed=0)
    held_out = {a.prompt_ids for a in split.held_out}
    assert len(split.held_out) == 4
    assert sorted(a.domain for a in split.held_out) == ["a", "a", "b", "b"]
    assert all(a.temperature == 0 for a in split.held_out)
    assert not held_out & {a.prompt_ids for a in split.train}
    assert len(split.train) == 80 - 8
    assert split == split_answers(answers, 4, seed=0)
    assert split != split_answers(answers, 4, seed=1)


def test_a_file_can_say_what_is_held_out(tmp_path):
    answers = [Answer((p,), (1, 2), temperature=t, held_out=p == 7 and t == 0) for p in range(40) for t in (0.0, 1.0)]
    path = answers_file(tmp_path, "".join(answer_line(a) for a in answers))
    split = split_answers(read_answers(path, VOCAB), 4, seed=0)
    assert [(a.prompt_ids, a.temperature) for a in split.held_out] == [((7,), 0.0)]
    assert len(split.train) == 78


# --- choices made from the data --------------------------------------------------------------------------------


def test_turns_of_a_conversation_are_on_one_side():
    firsts = [Answer((1, i), (7, i), "a") for i in range(40)]
    seconds = [Answer((*a.ids, 3), (8,), "a") for a in firsts[:20]]
    thirds = [Answer((*a.ids, 4), (9,), "a") for a in seconds[:10]]
    split = split_answers([*firsts, *seconds, *thirds], held_out=4, seed=0)
    begun = {a.prompt_ids[:2] for a in split.held_out}
    assert len(begun) == 4
    assert not begun & {a.prompt_ids[:2] for a in split.train}
    assert len(split.train) + len(split.held_out) == 70


def test_draft_vocabulary_by_hand():
    answers = [Answer((9, 9, 8), (5, 5, 5, 7)), Answer((8,), (7, 6))]
    # 99 must be there; 5 (three), 7 (two), 6 (one) in answers; 8 before 9 in prompts (two each, the lower id); then 0
    assert draft_vocabulary(answers, 4, VOCAB, (99,)) == [5, 6, 7, 99]
    assert draft_vocabulary(answers, 7, VOCAB, (99,)) == [0, 5, 6, 7, 8, 9, 99]


def test_default_taps_spread_from_1_to_l_minus_3():
    assert default_taps(36) == (1, 9, 17, 25, 33)  # what the released drafters of 36-layer targets have
    assert default_taps(40) == (1, 10, 19, 28, 37)
    assert default_taps(4) == (1,)
    assert default_taps(3) == (1,)
    assert default_taps(2) == (0,)


def test_mask_token_is_one_that_no_text_contains():
    answers = [Answer((0, 1, 2), (3, 4))]
    assert pick_mask_token(answers, 10, special_ids=[0, 1, 5, 6], stop_ids=[5]) == 6
    assert pick_mask_token(answers, 10, special_ids=[0, 1], stop_ids=[9]) == 8
    with pytest.raises(ConfigError, match="mask-token-id"):
        pick_mask_token(answers, 5, special_ids=[], stop_ids=[])


# --- plans -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"follow_ups": 1.5}, "follow_ups"),
        ({"own_prompts": -1}, "own_prompts"),
        ({"steps": None}, "minutes"),
        ({"minutes": 0.0}, "minutes"),
        ({"minutes": float("nan")}, "minutes"),
        ({"steps": -1}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"head": "wide"}, "head"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 65}, "block_size"),
        ({"limit": 0}, "limit"),
        ({"draft_vocab": -1}, "draft_vocab"),
        ({"seed": 2**63}, "seed"),
        ({"prompts": ("p.jsonl",)}, "answers"),
    ],
)
def test_a_plan_out_of_range_names_the_setting(values, param):
    with pytest.raises(ConfigError) as caught:
        plan(**values)
    assert caught.value.param == param


def test_a_folder_belongs_to_one_run(tmp_path):
    settle(plan(lr=5e-3), tmp_path / "run")
    settle(plan(lr=1e-3), tmp_path / "run")  # nothing was made with the plan before: it was only refused, say
    (tmp_path / "run" / "answers.jsonl").touch()
    for other in ({"answers": "b"}, {"target": "b"}):  # whose texts they are not
        with pytest.raises(ConfigError, match=r"(answers: a|target: qwen2.5-coder-0.5b) → b\).* --run-dir$"):
            settle(plan(**other), tmp_path / "run")
    settle(plan(lr=2e-3, limit=5, answers="./a"), tmp_path / "run")  # nothing was trained yet
    (tmp_path / "run" / "state.pt").touch()
    settle(plan(lr=2e-3, limit=5, steps=99), tmp_path / "run")  # how far to go may change
    with pytest.raises(ConfigError, match=r"lr: 0\.002 → 0\.001.* --answers .*answers\.jsonl"):
        settle(plan(lr=1e-3, limit=5), tmp_path / "run")
    (tmp_path / "run" / "train.json").write_text("{")
    with pytest.raises(ConfigError, match=r"train\.json"):
        settle(plan(), tmp_path / "run")


def test_texts_are_of_one_plan(tmp_path):
    settle(texts_plan(prompts=("p",)), tmp_path)
    (tmp_path / "turn-1.jsonl").touch()
    settle(texts_plan(prompts=("./p",), layers=3), tmp_path)
    for other in ({"turns": 2}, {"seed": 1}, {"prompts": ("p", "q")}, {"answer_tokens": 9}):
        with pytest.raises(ConfigError, match="other settings"):
            settle(texts_plan(**({"prompts": ("p",)} | other)), tmp_path)


def test_a_folder_holds_one_run_at_a_time(tmp_path):
    with alone(tmp_path / "run"):
        with pytest.raises(ConfigError, match="another run is at work"), alone(tmp_path / "run"):
            pass
        with alone(tmp_path / "other"):
            pass
    assert not (tmp_path / "run").exists()  # nothing came of it
    with alone(tmp_path / "run"):
        (tmp_path / "run" / "answers.jsonl").touch()
    assert (tmp_path / "run" / "answers.jsonl").exists()


# --- the texts -------------------------------------------------------------------------------------------------


class Codec(FakeTokenizer):
    """A chat as the fake service has it, open for the assistant or for the user."""

    def encode_chat(self, messages):
        return [*super().encode_chat(messages), *b"<assistant>"]

    def encode_open_turn(self, history, opening=""):
        return self.encode("".join(f"<{role}>{content}\n" for role, content in history) + "<user>" + opening)


class StubWriter:
    """Writes what follows from the question alone; fails after so many texts."""

    name = "stub"

    def __init__(self, fail_after=None, max_model_len=2048):
        self.fail_after, self.max_model_len = fail_after, max_model_len
        self.asked = []

    def write(self, asks):
        for ask in asks:
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise InternalError("failed on purpose")
            self.asked.append(ask)
            random = f"{ask.seed:x}"
            if bytes(ask.prompt_ids).rpartition(b"<")[2].startswith(b"user>"):
                # one in ten: words of one kind; one in ten: cut off
                text = "no " * 9 if ask.number % 10 == 3 else f" tell me about {random} and more"
                yield Written(ask, tuple(text.encode()), ask.number % 10 != 5)
            else:
                yield Written(ask, tuple(random.encode()), ask.number % 3 != 0)


def prompt_file(tmp_path, count=10, bad=None):
    lines = [json.dumps({"domain": "math", "messages": [{"role": "user", "content": f"{i} + {i}?"}]})
             for i in range(count)]  # fmt: skip
    if bad is not None:
        lines[bad] = lines[bad][:-5]
    path = tmp_path / "math.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def texts_plan(**values):
    return plan(**({"answers": None, "answer_tokens": 8} | values))


def write_texts(run_plan, folder, writer):
    folder.mkdir(exist_ok=True)
    return Scribe(run_plan, folder, given_prompts(run_plan, folder), writer, Codec(), SILENT).write_answers()


def test_an_unreadable_prompt_line_is_named_before_anything_is_asked(tmp_path):
    with pytest.raises(ConfigError, match=r"math\.jsonl:4"):
        read_files([prompt_file(tmp_path, bad=3)])


def test_half_is_greedy_and_repeats_are_not(tmp_path):
    asked = plan_questions(texts_plan(limit=25), read_files([prompt_file(tmp_path)]))
    assert len(asked) == 25
    assert [q.temperature for q in asked[:10]].count(0.0) == 5
    assert {q.temperature for q in asked[10:]} == {1.0}
    assert [q.messages for q in asked[10:20]] == [q.messages for q in asked[:10]]


def test_files_and_prompts_of_its_own_can_be_asked_together(tmp_path):
    run_plan = texts_plan(prompts=(prompt_file(tmp_path, 5),), own_prompts=10, turns=1)
    answers = read_answers(write_texts(run_plan, tmp_path / "run", StubWriter()), 1000)
    assert Counter(a.domain for a in answers) == {"math": 5, OWN_DOMAIN: 8}


@pytest.mark.parametrize("files", [True, False], ids=["from files", "by itself"])
def test_whatever_stage_a_kill_comes_in_the_end_is_the_same(tmp_path, files):
    prompts = (prompt_file(tmp_path, 30),) if files else ()
    run_plan = texts_plan(prompts=prompts, own_prompts=40, follow_ups=0.5)
    whole = StubWriter()
    text = write_texts(run_plan, tmp_path / "whole", whole).read_text()
    for texts in (1, 20, 45, 50, len(whole.asked) - 1):  # stages ask for different numbers; all of them are met
        folder = tmp_path / f"killed-{texts}"
        first, second = StubWriter(fail_after=texts), StubWriter()
        with pytest.raises(InternalError):
            write_texts(run_plan, folder, first)
        assert write_texts(run_plan, folder, second).read_text() == text
        assert sorted(first.asked + second.asked) == sorted(whole.asked)


def test_prompt_files_that_change_while_a_run_is_stopped_change_nothing_of_it(tmp_path):
    path = Path(prompt_file(tmp_path, 30))
    run_plan = texts_plan(prompts=(str(path),), follow_ups=0.5)
    text = write_texts(run_plan, tmp_path / "whole", StubWriter()).read_text()
    with pytest.raises(InternalError):
        write_texts(run_plan, tmp_path / "run", StubWriter(fail_after=12))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[5:]))
    assert write_texts(run_plan, tmp_path / "run", StubWriter()).read_text() == text
    path.unlink()
    assert given_prompts(run_plan, tmp_path / "run") == given_prompts(run_plan, tmp_path / "whole")


def test_a_target_writes_its_own_prompts_and_what_is_no_use_is_left_out(tmp_path):
    writer = StubWriter()
    answers = read_answers(write_texts(texts_plan(own_prompts=40, turns=1), tmp_path, writer), 1000)
    turns = [a for a in writer.asked if a.temperature == OWN_TEMPERATURE]
    assert len(turns) == 40
    assert len({a.seed for a in turns}) == 40
    assert {a.writer for a in answers} == {"stub"}
    assert len(answers) == 40 - 8  # a tenth stutters, a tenth never ends
    assert {a.domain for a in answers} == {OWN_DOMAIN}
    assert sum(a.temperature == 0 for a in answers) == 16
    assert all(b"tell me about" in bytes(a.prompt_ids) for a in answers)


def test_later_turns_go_on_from_what_was_said(tmp_path):
    run_plan = texts_plan(prompts=(prompt_file(tmp_path, 30),), follow_ups=0.5)
    answers = read_answers(write_texts(run_plan, tmp_path / "run", StubWriter()), 1000)
    by_turn = {n: [a for a in answers if bytes(a.prompt_ids).count(b"<user>") == n] for n in (1, 2, 3)}
    assert len(by_turn[1]) == 30
    ended = 20  # two in three come to an end of themselves; half of them go on, less what is no use as a turn
    assert ended // 2 - 3 <= len(by_turn[2]) <= ended // 2
    assert 0 < len(by_turn[3]) <= len(by_turn[2])
    for later in (2, 3):
        for answer in by_turn[later]:
            begun = bytes(answer.prompt_ids).rpartition(b"\n<user>")[0]
            before = [bytes(a.prompt_ids) + bytes(a.answer_ids) for a in by_turn[later - 1]]
            assert begun in before
        assert {a.temperature for a in by_turn[2]} == {0.0, 1.0}


class OneTurnCodec(Codec):
    """A template that takes a single turn."""

    def encode_open_turn(self, history, opening=""):
        if history:
            raise InvalidRequestError("only one turn is supported", param="input")
        return super().encode_open_turn(history, opening)


def test_a_template_that_refuses_later_turns_costs_those_alone(tmp_path):
    run_plan = texts_plan(prompts=(prompt_file(tmp_path, 30),), follow_ups=0.5)
    said = io.StringIO()
    tmp_path.joinpath("run").mkdir()
    prompts = given_prompts(run_plan, tmp_path / "run")
    path = Scribe(run_plan, tmp_path / "run", prompts, StubWriter(), OneTurnCodec(), Progress(said)).write_answers()
    assert len(read_answers(path, 1000)) == 30
    assert "chat template refuses 10 of them" in said.getvalue()


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Tell me about the tides.", True),
        ("tell me  about the TIDES.", False),  # again
        ("Why so?", False),
        ("the the the the the tides", False),
    ],
)
def test_turns_that_are_of_use(text, good):
    assert usable(text, {"tell me about the tides."} if "TIDES" in text else set()) is good


def test_prompts_that_do_not_fit_are_passed_over(tmp_path):
    path = write_texts(texts_plan(prompts=(prompt_file(tmp_path),)), tmp_path / "run", StubWriter(max_model_len=26))
    assert path.read_text() == ""


def test_a_failing_engine_leaves_what_was_written(tmp_path):
    run_plan = texts_plan(prompts=(prompt_file(tmp_path),), turns=1)
    scripts = iter([Script()] * 4 + [Script(fail_after_rounds=1)] * 6)
    engine = LocalEngine(FakeEngine(lambda request: next(scripts)))
    with contextlib.closing(EngineWriter(engine, 1, 2048)) as writer, pytest.raises(InternalError, match="purpose"):
        write_texts(run_plan, tmp_path / "run", writer)
    assert len(take_up(tmp_path / "run" / "turn-1.jsonl.part")) == 4


def test_a_line_cut_in_half_is_asked_again(tmp_path):
    run_plan = texts_plan(prompts=(prompt_file(tmp_path),), turns=1)
    text = write_texts(run_plan, tmp_path / "whole", StubWriter()).read_text()
    lines = text.splitlines(keepends=True)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "turn-1.jsonl.part").write_text(lines[7] + lines[2] + lines[5] + lines[0][:30])
    writer = StubWriter()
    assert write_texts(run_plan, folder, writer).read_text() == text
    assert sorted(a.number for a in writer.asked) == [0, 1, 3, 4, 6, 8, 9]


def test_a_full_disk_loses_no_whole_answer(tmp_path):
    run_plan = texts_plan(prompts=(prompt_file(tmp_path),), turns=1)
    folder = tmp_path / "run"
    with files_no_larger_than(700), pytest.raises(ConfigError, match="run the same command again"):
        write_texts(run_plan, folder, StubWriter())
    kept = take_up(folder / "turn-1.jsonl.part")
    assert 0 < len(kept) < 10
    assert len(read_answers(write_texts(run_plan, folder, StubWriter()), 1000)) == 10


def test_openvino_writes_only_where_it_can(monkeypatch):
    installed = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    assert choose_writer("auto", "model.gguf", "cpu") == "engine"
    with pytest.raises(ConfigError, match=r"pip install dspark-stream\[openvino\]"):
        choose_writer("openvino", "model.gguf", "auto")
    installed.append("openvino_genai")
    assert choose_writer("auto", "model.gguf", "cpu") == "openvino"
    assert choose_writer("auto", "model.gguf", "cuda") == "engine"
    assert choose_writer("auto", "folder", "cpu") == "engine"
    assert choose_writer("engine", "model.gguf", "cpu") == "engine"
    with pytest.raises(ConfigError, match=r"needs a \.gguf"):
        choose_writer("openvino", "folder", "cpu")
