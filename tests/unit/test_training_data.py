"""Prompts, answers and plans: what is read, what is refused in words, and what a kill or a full disk leaves."""

import json

import pytest

from disk import files_no_larger_than
from dspark_stream.errors import ConfigError, InternalError
from dspark_stream.local import LocalEngine
from dspark_stream.progress import SILENT
from dspark_stream.training.answering import plan_questions, take_up, write_answers
from dspark_stream.training.answers import Answer, answer_line, draft_vocabulary, read_answers, split_answers
from dspark_stream.training.initial import default_taps, pick_mask_token
from dspark_stream.training.plan import TrainPlan, settle
from fakes import FakeEngine, FakeTokenizer, Script

VOCAB = 100


def plan(**values):
    return TrainPlan(**({"answers": "a", "steps": 1} | values))


# --- answers files -------------------------------------------------------------------------------------------


def test_an_answer_survives_its_line():
    answer = Answer((1, 2), (3, 4, 5), "math", 1.0)
    path_line = answer_line(answer, index=7)
    assert path_line.endswith("\n")
    assert json.loads(path_line)["index"] == 7


def answers_file(tmp_path, text):
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    return path


LINE = answer_line(Answer((1, 2), (3, 4, 5)))


def test_an_answers_file_cut_in_half_keeps_its_whole_lines(tmp_path):
    path = answers_file(tmp_path, LINE * 3 + LINE[:20])
    assert len(read_answers(path, VOCAB)) == 3


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


# --- choices made from the data --------------------------------------------------------------------------------


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
        ({"answers": None}, "prompts"),
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
    ],
)
def test_a_plan_out_of_range_names_the_setting(values, param):
    with pytest.raises(ConfigError) as caught:
        plan(**values)
    assert caught.value.param == param


def test_a_folder_belongs_to_one_run(tmp_path):
    settle(plan(lr=1e-3), tmp_path / "run")
    settle(plan(lr=1e-3, steps=99), tmp_path / "run")  # how far to go may change
    with pytest.raises(ConfigError, match=r"lr: 0\.001 → 0\.002"):
        settle(plan(lr=2e-3), tmp_path / "run")
    (tmp_path / "run" / "train.json").write_text("{")
    with pytest.raises(ConfigError, match=r"train\.json"):
        settle(plan(), tmp_path / "run")


# --- the answers stage -----------------------------------------------------------------------------------------


def prompt_file(tmp_path, count=10, bad=None):
    lines = [json.dumps({"domain": "math", "messages": [{"role": "user", "content": f"{i} + {i}?"}]})
             for i in range(count)]  # fmt: skip
    if bad is not None:
        lines[bad] = lines[bad][:-5]
    path = tmp_path / "math.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_an_unreadable_prompt_line_is_named_before_anything_is_asked(tmp_path):
    with pytest.raises(ConfigError, match=r"math\.jsonl:4"):
        plan_questions(plan(prompts=(prompt_file(tmp_path, bad=3),)))


def test_half_is_greedy_and_repeats_are_not(tmp_path):
    asked = plan_questions(plan(prompts=(prompt_file(tmp_path),), limit=25))
    assert len(asked) == 25
    assert [q.temperature for q in asked[:10]].count(0.0) == 5
    assert {q.temperature for q in asked[10:]} == {1.0}
    assert [q.messages for q in asked[10:20]] == [q.messages for q in asked[:10]]


def test_answers_are_written_by_index_and_taken_up_after_a_kill(tmp_path):
    run_plan = plan(prompts=(prompt_file(tmp_path),), answer_tokens=8)
    folder = tmp_path / "run"
    folder.mkdir()

    def write(engine):
        with LocalEngine(engine) as local:
            return write_answers(run_plan, folder, local, FakeTokenizer(), 2048, SILENT)

    whole = write(FakeEngine())
    text = whole.read_text()
    answers = read_answers(whole, 1000)
    assert len(answers) == 10
    assert all(a.answer_ids == tuple(range(8)) for a in answers)
    asked = plan_questions(run_plan)
    assert [a.temperature for a in answers] == [q.temperature for q in asked]
    # a kill: four answers are there, the last of them half
    whole.unlink()
    lines = text.splitlines(keepends=True)
    part = folder / "answers.part.jsonl"
    part.write_text(lines[7] + lines[2] + lines[5] + lines[0][:30])
    engine = FakeEngine()
    assert write(engine).read_text() == text
    assert {r.request_id for r in engine.submitted} == {str(i) for i in range(10)} - {"7", "2", "5"}
    assert not part.exists()


def test_prompts_that_do_not_fit_are_passed_over(tmp_path):
    run_plan = plan(prompts=(prompt_file(tmp_path),), answer_tokens=8)
    with LocalEngine(FakeEngine()) as local:
        path = write_answers(run_plan, tmp_path, local, FakeTokenizer(), 15, SILENT)
    assert path.read_text() == ""


def test_a_failing_engine_leaves_what_was_written(tmp_path):
    run_plan = plan(prompts=(prompt_file(tmp_path),), answer_tokens=8, streams=1)
    scripts = iter([Script()] * 4 + [Script(fail_after_rounds=1)] * 6)
    with LocalEngine(FakeEngine(lambda request: next(scripts))) as local, pytest.raises(InternalError, match="purpose"):
        write_answers(run_plan, tmp_path, local, FakeTokenizer(), 2048, SILENT)
    assert len(take_up(tmp_path / "answers.part.jsonl")) == 4


def test_a_full_disk_loses_no_whole_answer(tmp_path):
    run_plan = plan(prompts=(prompt_file(tmp_path),), answer_tokens=8)
    with (
        LocalEngine(FakeEngine()) as local,
        files_no_larger_than(700),
        pytest.raises(ConfigError, match="run the same command again"),
    ):
        write_answers(run_plan, tmp_path, local, FakeTokenizer(), 2048, SILENT)
    kept = take_up(tmp_path / "answers.part.jsonl")
    assert 0 < len(kept) < 10
    with LocalEngine(FakeEngine()) as local:
        path = write_answers(run_plan, tmp_path, local, FakeTokenizer(), 2048, SILENT)
    assert len(read_answers(path, 1000)) == 10
