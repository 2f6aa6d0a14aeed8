"""A whole training run on a tiny target: what it reaches, and that it goes on after a kill to the same weights."""

import contextlib
import csv
import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from disk import files_no_larger_than
from dspark_stream.commands import program
from dspark_stream.commands.common import EXIT_INTERRUPTED
from dspark_stream.console import SILENT, Progress
from dspark_stream.decoding.calibration import load_calibration
from dspark_stream.engine.local import LocalEngine
from dspark_stream.errors import ConfigError
from dspark_stream.models.checkpoint import load_drafter
from dspark_stream.models.loading import load_target
from dspark_stream.models.torch.target import Target
from dspark_stream.training import loop, pipeline
from dspark_stream.training.answers import read_answers, split_answers
from dspark_stream.training.plan import TrainPlan, settle
from dspark_stream.training.validate import Walked, walk
from dspark_stream.training.workers import Workers
from dspark_stream.types import MAX_SEED
from tiny import tiny_target

VOCAB = 48
SHAPE = ["--block-size", "4", "--layers", "1", "--rank", "8", "--draft-vocab", "40", "--mask-token-id", "0"]
TRAINING = ["--batch", "6", "--anchors", "12", "--lr", "0.01", "--held-out", "6", "--answer-tokens", "24"]


def trained(argv):
    """The exit code of the command."""
    return program.main(["train", *argv])


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    """A tiny target as people have them: weights and tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    target = tiny_target(vocab=VOCAB)
    for parameter in target.decoder.layers.parameters():
        if parameter.ndim == 2:
            parameter.mul_(0.4)  # a random network at full strength writes noise that nobody could foretell
    target.model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCAB)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "words.jsonl"
    lines = [{"domain": "ab"[i % 2], "messages": [{"role": "user", "content": f"w{2 + i % 46} w{i // 46}"}]}
             for i in range(120)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def run_folder(target_folder, prompts, tmp_path_factory):
    """A finished run of the command, from prompts."""
    folder = tmp_path_factory.mktemp("run")
    argv = ["--target", str(target_folder), "--prompts", str(prompts), "--run-dir", str(folder), *SHAPE, *TRAINING]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_stream.measure.calibrate.LEAST_ROUNDS", 20)
        assert trained([*argv, "--steps", "80", "--validate-every", "40", "--licence", "words: CC0"]) == 0
    return folder


def held_out_lengths(folder):
    with (folder / "log.csv").open(newline="") as file:
        return [float(row["accepted_length"]) for row in csv.DictReader(file) if row["kind"] == "held_out"]


def test_answers_are_half_greedy_and_the_targets_own(run_folder, target_folder):
    answers = read_answers(run_folder / "answers.jsonl", VOCAB)
    assert len(answers) == 120
    for domain in "ab":
        assert sum(a.temperature == 0 for a in answers if a.domain == domain) == 30
    target = load_target(str(target_folder)).target
    greedy = next(a for a in answers if a.temperature == 0)
    features = pipeline.FeatureSource(run_folder / "none", target, [greedy], budget=0, fingerprint="").get([0])[0]
    assert target.logits(features.final).argmax(-1).tolist() == list(greedy.answer_ids)


def test_a_minute_of_training_is_worth_having(run_folder, target_folder):
    """Untrained the drafter is right about once in 40 rounds; a trained one must be right far more often."""
    lengths = held_out_lengths(run_folder)
    assert len(lengths) == 2
    assert lengths[-1] > 1.7
    loaded = load_target(str(target_folder))
    drafter = load_drafter(run_folder / "drafter", loaded.target)
    split = split_answers(read_answers(run_folder / "answers.jsonl", VOCAB), 6, 0)
    source = pipeline.FeatureSource(run_folder / "none", loaded.target, split.held_out, budget=0, fingerprint="")
    walked = walk(drafter, split.held_out, source.get(range(len(split.held_out))))
    saved = Walked([a for w in walked.values() for a in w.accepted]).accepted_length
    assert saved == pytest.approx(lengths[-1], abs=0.2)  # the file holds bfloat16


def test_the_saved_drafter_says_how_it_was_made(run_folder):
    card = (run_folder / "drafter" / "card.md").read_text()
    assert "words: CC0" in card
    assert f"| all | {held_out_lengths(run_folder)[-1]:.3f}".rstrip("0") in card
    calibration = load_calibration(run_folder / "drafter")
    assert [len(t) for t in (calibration.greedy, calibration.rejection, calibration.coupled)] == [4, 4, 4]
    in_engine = re.search(r"^\| greedy \| (\d+) \| ([\d.]+) \|", card, re.MULTILINE)
    assert int(in_engine[1]) > 20
    assert float(in_engine[2]) == pytest.approx(held_out_lengths(run_folder)[-1], abs=0.25)
    plan = json.loads((run_folder / "drafter" / "train.json").read_text())
    assert plan["steps"] == 80
    assert plan["seed"] == 0


def trainer_of(target_folder, answers, folder, progress=SILENT, **changes):
    folder.mkdir(exist_ok=True)
    values = {"steps": 8, "batch": 4, "anchors": 6, "layers": 1, "rank": 8, "block_size": 4, "draft_vocab": 40,
              "mask_token_id": 0, "held_out": 4, "validate_every": 100, "lr": 0.01}  # fmt: skip
    plan = TrainPlan(target=str(target_folder), answers=str(answers), **(values | changes))
    loaded = load_target(plan.target)
    split = split_answers(read_answers(answers, VOCAB), plan.held_out, plan.seed)
    return pipeline.new_trainer(plan, loaded, split, folder, progress)


def weights(trainer):
    return {name: t.clone() for name, t in trainer.drafter.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("head", ["markov", "gated", "rnn", "none"])
def test_a_killed_run_ends_at_the_same_weights(target_folder, run_folder, tmp_path, head):
    answers = run_folder / "answers.jsonl"
    whole = trainer_of(target_folder, answers, tmp_path / "whole", head=head)
    assert whole.run()
    first = trainer_of(target_folder, answers, tmp_path / "cut", head=head)
    assert not first.run(stop=lambda: first.step >= 3)
    for _ in range(2):  # steps after the last saved state are lost in a kill, and made again
        first.train_step()
    second = trainer_of(target_folder, answers, tmp_path / "cut", head=head)
    assert second.step == 3
    assert second.run()
    assert second.step == whole.step == 8
    assert same(weights(whole), weights(second))
    other = trainer_of(target_folder, answers, tmp_path / "other", head=head, seed=1)
    other.run()
    assert not same(weights(whole), weights(other))


def test_a_process_that_is_killed_outright_ends_at_the_same_weights(target_folder, run_folder, tmp_path):
    """The command itself, ended by SIGKILL while it trains and given again."""
    answers = ["--answers", str(run_folder / "answers.jsonl"), "--steps", "60", "--checkpoint-minutes", "0.0001"]
    argv = ["--target", str(target_folder), *answers, *SHAPE, *TRAINING, "--threads", "1", "--run-dir"]
    command = [sys.executable, "-m", "dspark_stream", "train", *argv, str(tmp_path / "killed")]
    state = tmp_path / "killed" / "state.pt"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
    assert 0 < torch.load(state, weights_only=True)["step"] < 60
    assert not (tmp_path / "killed" / "drafter").exists()
    for name in ("killed", "whole"):
        assert trained([*argv, str(tmp_path / name)]) == 0
    killed, whole = ((tmp_path / name / "drafter" / "model.safetensors").read_bytes() for name in ("killed", "whole"))
    assert killed == whole


@pytest.mark.parametrize("head", ["markov", "none"])
def test_however_many_workers_the_gradient_is_the_same(target_folder, run_folder, tmp_path, head):
    """Of answers of unequal length, one of a single token, with more workers than answers as well."""
    answers = read_answers(run_folder / "answers.jsonl", VOCAB)[:5]
    answers = [replace(a, answer_ids=a.answer_ids[: 1 + 6 * i]) for i, a in enumerate(answers)]
    trainer = trainer_of(target_folder, run_folder / "answers.jsonl", tmp_path / "run", head=head)
    features = pipeline.FeatureSource(tmp_path / "none", trainer.drafter.target, answers, budget=0, fingerprint="")
    gradients, losses = [], []
    for count in (1, 2, 3, 8):
        with contextlib.closing(Workers(trainer.drafter, 8, count)) as workers:
            assert len(workers.workers) == count
            parts = workers.backward(answers, features, [0, 1, 2, 3, 4], trainer.anchors(answers, 3))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters]))
        losses.append((parts.total.item(), parts.ce, parts.l1, parts.confidence))
    assert gradients[0].abs().max() > 0
    for gradient, loss in zip(gradients[1:], losses[1:], strict=True):
        assert torch.allclose(gradient, gradients[0], atol=1e-5)
        assert loss == pytest.approx(losses[0], rel=1e-4)


def test_features_beyond_the_budget_are_computed_anew(target_folder, run_folder, tmp_path):
    answers = run_folder / "answers.jsonl"
    cached = trainer_of(target_folder, answers, tmp_path / "cached")
    part = trainer_of(target_folder, answers, tmp_path / "part", feature_budget=200_000)
    none = trainer_of(target_folder, answers, tmp_path / "none", feature_budget=0)
    assert cached.features.cached == 120
    assert 0 < part.features.cached < 120
    assert none.features.cached == 0
    for a, b, c in zip(*(t.features.get([3, 80, 110]) for t in (cached, part, none)), strict=True):
        assert torch.allclose(a.taps, c.taps, atol=0.02, rtol=0.01)  # a last bit of bfloat16
        assert torch.equal(c.taps, c.taps.bfloat16().float())
        assert torch.allclose(b.lse, c.lse, atol=1e-4)
        assert torch.allclose(a.final, b.final, atol=0.02, rtol=0.01)


def test_features_go_on_where_a_kill_left_them(target_folder, run_folder, tmp_path, monkeypatch):
    answers = run_folder / "answers.jsonl"
    monkeypatch.setattr("dspark_stream.training.features.PASS_TOKENS", 200)
    computed = []
    real = pipeline.FeatureSource._write

    def write(self, i, features):
        if len(computed) == 50:
            raise KeyboardInterrupt
        computed.append(i)
        real(self, i, features)

    monkeypatch.setattr(pipeline.FeatureSource, "_write", write)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(target_folder, answers, tmp_path / "run")
    before = list(computed)
    computed.clear()
    monkeypatch.setattr(pipeline.FeatureSource, "_write", lambda *a: (computed.append(a[1]), real(*a))[1])
    resumed = trainer_of(target_folder, answers, tmp_path / "run")
    assert 0 < computed[0] <= 50
    assert len(before) - computed[0] < 10  # at most one pass is made again
    assert computed[-1] == 119
    fresh = trainer_of(target_folder, answers, tmp_path / "fresh")
    for a, b in zip(resumed.features.get(range(120)), fresh.features.get(range(120)), strict=True):
        assert torch.equal(a.taps, b.taps)


def test_a_full_disk_is_said_and_keeps_the_earlier_state(target_folder, run_folder, tmp_path):
    answers = run_folder / "answers.jsonl"
    trainer = trainer_of(target_folder, answers, tmp_path / "run")
    trainer.train_step()
    trainer.save()
    before = (tmp_path / "run" / "state.pt").read_bytes()
    trainer.train_step()
    with files_no_larger_than(2000), pytest.raises(ConfigError, match="cannot be saved"):
        trainer.save()
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.part"))
    with files_no_larger_than(2000), pytest.raises(ConfigError, match="--feature-budget"):
        trainer_of(target_folder, answers, tmp_path / "other")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_earlier_drafter_whole(target_folder, run_folder, tmp_path, monkeypatch):
    shutil.copytree(run_folder / "drafter", tmp_path / "out")
    before = contents(tmp_path / "out")
    trainer = trainer_of(target_folder, run_folder / "answers.jsonl", tmp_path / "run")
    folder = tmp_path / "run"
    shutil.copy(run_folder / "train.json", folder)

    def full(source, to):
        raise OSError(errno.ENOSPC, "No space left on device", str(to))

    with files_no_larger_than(2000), pytest.raises(ConfigError, match="cannot be written"):  # of the weights
        pipeline.save(trainer, tmp_path / "out", folder)
    assert contents(tmp_path / "out") == before
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.shutil, "copyfile", full)  # of the last file
        with pytest.raises(ConfigError, match="cannot be written"):
            pipeline.save(trainer, tmp_path / "out", folder)
    assert contents(tmp_path / "out") == before
    pipeline.save(trainer, tmp_path / "out", folder)
    after = contents(tmp_path / "out")
    assert before.keys() - after.keys() == {"card.md", "calibration.json"}  # of other weights
    assert after["model.safetensors"] != before["model.safetensors"]


def test_a_run_by_the_clock_ends_with_its_state_saved(target_folder, run_folder, tmp_path, monkeypatch):
    """Also where the end comes while it validates."""
    trainer = trainer_of(
        target_folder, run_folder / "answers.jsonl", tmp_path / "run", steps=None, minutes=1.0, validate_every=5
    )
    now, rates = 0.0, []

    def train_step():
        nonlocal now
        now += 10
        parts = real()
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        return parts

    def validate():
        nonlocal now
        now += 15
        return real_validate()

    real, real_validate = trainer.train_step, trainer.validate
    monkeypatch.setattr(trainer, "train_step", train_step)
    monkeypatch.setattr(trainer, "validate", validate)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: now))
    assert trainer.run()
    assert trainer.step == 5
    assert 0 < rates[-1] < rates[1]
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 5
    again = trainer_of(target_folder, run_folder / "answers.jsonl", tmp_path / "run", steps=None, minutes=1.0)
    assert again.elapsed_s == 65
    assert again.run()
    assert again.step == 5


def test_a_gradient_that_is_not_finite_changes_nothing(target_folder, run_folder, tmp_path):
    trainer = trainer_of(target_folder, run_folder / "answers.jsonl", tmp_path / "run", seed=MAX_SEED)
    trainer.train_step()
    with torch.no_grad():
        trainer.drafter.fc.weight[0, 0] = float("inf")
    trainer.workers.follow()
    before = weights(trainer)
    with pytest.raises(ConfigError, match="step 2: the gradient is not finite"):
        trainer.train_step()
    assert same(weights(trainer), before)


def test_features_that_were_cut_short_are_computed_anew(target_folder, run_folder, tmp_path, capsys):
    answers = run_folder / "answers.jsonl"
    whole = trainer_of(target_folder, answers, tmp_path / "run").features.get(range(120))
    for spoil in (lambda path: os.truncate(path, path.stat().st_size // 2), lambda path: path.unlink()):
        spoil(tmp_path / "run" / "features" / "taps.bin")
        trainer = trainer_of(target_folder, answers, tmp_path / "run", progress=Progress())
        assert "taps.bin is not as long as it was left" in capsys.readouterr().err
        for a, b in zip(trainer.features.get(range(120)), whole, strict=True):
            assert torch.equal(a.taps, b.taps)


def again(target_folder, prompts, run_folder, *more):
    """The command of a finished run, in a copy of its folder."""
    argv = ["--target", str(target_folder), "--prompts", str(prompts), "--run-dir", str(run_folder), *SHAPE, *TRAINING]
    return trained([*argv, "--steps", "80", "--validate-every", "40", "--licence", "words: CC0", *more])


def test_a_kill_while_calibrating_costs_the_calibration_alone(
    target_folder, prompts, run_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("dspark_stream.measure.calibrate.LEAST_ROUNDS", 20)
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    finished = {name: (folder / "drafter" / name).read_bytes() for name in ("calibration.json", "card.md")}
    (folder / "finished.json").unlink()
    rounds = 0

    def killed(self, *args):
        nonlocal rounds
        for event in real(self, *args):
            rounds += 1
            if rounds == 40:
                raise KeyboardInterrupt
            yield event

    real = LocalEngine.run
    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "run", killed)
        assert again(target_folder, prompts, folder) == EXIT_INTERRUPTED
    weights = (folder / "drafter" / "model.safetensors").read_bytes()
    assert not (folder / "drafter" / "calibration.json").exists()
    assert again(target_folder, prompts, folder) == 0
    assert (folder / "drafter" / "model.safetensors").read_bytes() == weights
    assert (folder / "drafter" / "calibration.json").read_bytes() == finished["calibration.json"]
    assert (folder / "drafter" / "card.md").read_bytes().endswith(finished["card.md"].partition(b"## Held-out")[2])


def test_a_full_disk_while_calibrating_is_said_and_made_good(
    target_folder, prompts, run_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("dspark_stream.measure.calibrate.LEAST_ROUNDS", 20)
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    (folder / "finished.json").unlink()
    real = pipeline.save_calibration

    def full(calibration, out):
        with files_no_larger_than(100):
            return real(calibration, out)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_calibration", full)
        assert again(target_folder, prompts, folder) == 2
    assert "calibration.json cannot be written" in capsys.readouterr().err
    assert not list((folder / "drafter").glob("calibration.json*"))
    assert again(target_folder, prompts, folder) == 0
    assert (folder / "drafter" / "calibration.json").read_bytes() == (
        run_folder / "drafter" / "calibration.json"
    ).read_bytes()


def test_a_broken_state_is_said(target_folder, run_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ConfigError, match="cannot be taken up"):
        trainer_of(target_folder, run_folder / "answers.jsonl", tmp_path / "run")


def test_the_command_says_what_is_wrong(target_folder, run_folder, tmp_path, capsys):
    def refused(*argv):
        assert trained(["--target", str(target_folder), "--run-dir", str(tmp_path / "new"), *argv]) == 2
        return capsys.readouterr().err

    assert "follow_ups 2.0" in refused("--steps", "1", "--follow-ups", "2")
    assert "--minutes or --steps" in refused("--answers", "a.jsonl")
    assert "a.jsonl" in refused("--answers", str(tmp_path / "a.jsonl"), "--steps", "1")
    given = ["--answers", str(run_folder / "answers.jsonl"), "--steps", "1"]
    other = str(run_folder)
    assert "other settings" in refused(*given, "--run-dir", other)


def test_what_is_wrong_is_said_before_anything_is_written(target_folder, run_folder, prompts, tmp_path, capsys):
    """And the folder stays free for the command that is right."""
    folder = tmp_path / "run"
    broken = tmp_path / "broken.jsonl"
    few = tmp_path / "few.jsonl"
    line = (run_folder / "answers.jsonl").read_text().partition("\n")[0]
    few.write_text(f"{line}\n")
    broken.write_text(f"{line}\n{line[:-9]}\n{line}\n")
    texts = ["--prompts", str(prompts)]
    for wrong, said in (
        (["--prompts", str(tmp_path / "typo.jsonl")], "typo.jsonl"),
        ([*texts, "--target", str(tmp_path / "nobody")], "nobody"),
        ([*texts, "--mask-token-id", "48"], "mask_token_id 48"),
        ([*texts, "--taps", "1,77"], "77"),
        ([*texts, "--out", str(broken)], f"{broken} is no folder to write in"),
        (["--answers", str(prompts)], "line 1: no usable answer: it has no prompt_ids and no answer_ids"),
        (["--answers", str(broken)], f"{broken}, line 2"),
        (["--answers", str(few)], f"{few}: too few answers: of 1, 1 are to be trained on and 0 held out"),
    ):
        argv = ["--target", str(target_folder), "--run-dir", str(folder), *TRAINING, "--steps", "1", *wrong]
        assert trained(argv) == 2
        assert said in capsys.readouterr().err
        assert not folder.exists()


def test_a_run_from_before_a_setting_had_its_default(tmp_path):
    plan = TrainPlan(steps=1, answers="a.jsonl")
    settle(plan, tmp_path)
    (tmp_path / "state.pt").touch()
    saved = json.loads((tmp_path / "train.json").read_text())
    del saved["start"]
    (tmp_path / "train.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="start: target → random"):
        settle(replace(plan, start="random"), tmp_path)
    settle(plan, tmp_path)


def finished_in(folder, run_folder):
    """A copy of a finished run that knows where it is now."""
    shutil.copytree(run_folder, folder)
    said = json.loads((folder / "finished.json").read_text())
    (folder / "finished.json").write_text(json.dumps(said | {"out": str(folder / "drafter")}, indent=2) + "\n")


def test_the_same_command_again_has_nothing_left_to_do(run_folder, target_folder, prompts, tmp_path, capsys):
    """It leaves a better calibration alone, too."""
    folder = tmp_path / "run"
    finished_in(folder, run_folder)
    (folder / "drafter" / "calibration.json").write_text("a better one")

    def times():
        files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("train.json", "lock")]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    for more in ([], ["--threads", "1", "--streams", "3"], ["--target", f"{target_folder}/"]):
        assert again(target_folder, prompts, folder, *more) == 0
        assert "nothing is left to do" in capsys.readouterr().err
        assert times() == before


def test_what_is_finished_is_this_run_in_this_place(target_folder, prompts, run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dspark_stream.measure.calibrate.LEAST_ROUNDS", 20)
    folder = tmp_path / "run"
    finished_in(folder, run_folder)
    weights = folder / "drafter" / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    assert again(target_folder, prompts, folder) == 0  # its state is there, so nothing is trained anew
    assert weights.read_bytes() == whole
    assert again(target_folder, prompts, folder, "--out", str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole
    assert "nothing is left" not in capsys.readouterr().err
    assert again(target_folder, prompts, folder, "--out", str(tmp_path / "out"), "--steps", "82") == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != whole


def test_a_target_is_held_once(target_folder, prompts, tmp_path, monkeypatch):
    """By whatever needs one: the rehearsal, the writer, the training, the calibration."""
    monkeypatch.setattr("dspark_stream.measure.calibrate.LEAST_ROUNDS", 20)
    targets, alive = weakref.WeakSet(), []
    real = Target.__init__

    def init(self, *args, **kwargs):
        alive.append(len(targets))
        real(self, *args, **kwargs)
        targets.add(self)

    monkeypatch.setattr(Target, "__init__", init)
    gc.disable()  # the pipeline has to see to it
    try:
        argv = ["--target", str(target_folder), "--prompts", str(prompts), *SHAPE, *TRAINING, "--steps", "1"]
        assert trained([*argv, "--limit", "20", "--held-out", "2", "--run-dir", str(tmp_path / "run")]) == 0
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]


def test_going_on_from_a_drafter_begins_where_it_ended(target_folder, run_folder, tmp_path, capsys):
    answers = ["--answers", str(run_folder / "answers.jsonl")]
    argv = ["--target", str(target_folder), *answers, *TRAINING, "--steps", "1", "--run-dir", str(tmp_path / "on")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_stream.measure.calibrate.LEAST_ROUNDS", 20)
        assert trained([*argv, "--init", str(run_folder / "drafter")]) == 0
    before, after = held_out_lengths(run_folder)[-1], held_out_lengths(tmp_path / "on")[-1]
    assert after == pytest.approx(before, abs=0.25)
    plan = json.loads((tmp_path / "on" / "drafter" / "train.json").read_text())
    assert [plan[name] for name in ("layers", "block_size", "rank", "draft_vocab", "head")] == [1, 4, 8, 40, "markov"]
    assert trained([*argv, "--init", str(tmp_path / "nobody")]) == 2
    assert "no drafter to start from" in capsys.readouterr().err


def test_a_drafter_can_be_made_deeper(target_folder, run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dspark_stream.measure.calibrate.LEAST_ROUNDS", 20)
    answers = ["--answers", str(run_folder / "answers.jsonl")]
    argv = ["--target", str(target_folder), *answers, *TRAINING, "--steps", "1", "--add-layers", "1"]
    again = [*argv, "--init", str(run_folder / "drafter"), "--run-dir", str(tmp_path / "on")]
    assert trained(again) == 0
    before, after = held_out_lengths(run_folder)[-1], held_out_lengths(tmp_path / "on")[-1]
    assert after == pytest.approx(before, abs=0.25)
    out = tmp_path / "on" / "drafter"
    for file, field in (("train.json", "layers"), ("config.json", "num_hidden_layers")):
        assert json.loads((out / file).read_text())[field] == 2
    assert "1 of them put on top of its own" in (out / "card.md").read_text()
    assert trained(again) == 0  # the same command is the same run
    assert "nothing is left to do" in capsys.readouterr().err
    assert trained([*again, "--out", str(run_folder / "drafter")]) == 2
    assert "must be another folder" in capsys.readouterr().err
    assert trained([*argv, "--run-dir", str(tmp_path / "new")]) == 2
    assert "needs --init" in capsys.readouterr().err


def test_a_signal_is_heeded_where_nobody_reads_what_is_said(monkeypatch):
    def write(to, text):
        raise BrokenPipeError

    monkeypatch.setattr(pipeline.os, "write", write)
    with pipeline.asked_to_stop() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()


def test_a_signal_stops_after_the_step_with_its_state_saved(target_folder, run_folder, tmp_path, monkeypatch, capfd):
    real = pipeline.Trainer.train_step

    def train_step(self):
        parts = real(self)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return parts

    monkeypatch.setattr(pipeline.Trainer, "train_step", train_step)
    answers = ["--answers", str(run_folder / "answers.jsonl")]
    argv = ["--target", str(target_folder), *answers, "--run-dir", str(tmp_path), *SHAPE, *TRAINING, "--steps", "30"]
    before = signal.getsignal(signal.SIGTERM)
    assert trained(argv) == EXIT_INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) == before
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3
    assert "stopping after this step; once more ends it now" in capfd.readouterr().err
    assert not (tmp_path / "drafter").exists()
