"""The stages of a training run, in order: texts → features → training → calibration → the drafter with its card.

Each stage leaves its result in the run's folder and starts where a killed one stopped::

    train.json     the plan
    answers.jsonl  what the target wrote (answering.py names the files on the way), or a snapshot of the file given
    features/      the target's hidden states, within the budget; needed only while training
    state.pt       weights, optimiser and place of the training
    log.csv        losses and held-out accepted lengths
    drafter/       the drafter in DeepSpec's format, its calibration, its card and the plan
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError

from dspark_kernels.linear import can_pack, pack_linears
from dspark_stream.calibrate import Fit, calibrate, calibration_config
from dspark_stream.config import Config, default_cache_dir
from dspark_stream.engine.build import build_engine
from dspark_stream.errors import ConfigError
from dspark_stream.local import LocalEngine
from dspark_stream.models.checkpoint import load_drafter, save_drafter
from dspark_stream.models.drafter import Drafter, DrafterConfig, backbone_config
from dspark_stream.models.embedded import ensure_embedded_model
from dspark_stream.models.loading import LoadedTarget, load_target
from dspark_stream.progress import Progress
from dspark_stream.spec.calibration import CALIBRATION_FILE, save_calibration
from dspark_stream.training.answering import Scribe, read_files
from dspark_stream.training.answers import Answer, Split, draft_vocabulary, read_answers, split_answers
from dspark_stream.training.card import hardware, write_card
from dspark_stream.training.features import FeatureSource
from dspark_stream.training.initial import deepened, default_taps, pick_mask_token, start_from_target
from dspark_stream.training.loop import LoopConfig, Trainer
from dspark_stream.training.plan import FILE, TrainPlan
from dspark_stream.training.writers import EngineWriter, OpenVinoWriter, Writer, choose_writer
from dspark_stream.types import Acceptance

CALIBRATION_STREAMS = 16
CALIBRATION_TOKENS = 256


def run_stages(plan: TrainPlan, folder: Path, out: Path, progress: Progress) -> bool:
    """All stages; False where a signal ended the training early (its state is saved).

    Raises:
        DsparkError: whatever cannot be used or written, said in words; what is done is kept.
    """
    target_name = plan.target
    if target_name == "embedded":
        target_name = str(ensure_embedded_model(default_cache_dir(), progress))
    with progress.stage(f"loading {target_name}"):
        loaded = load_target(target_name, device=plan.device)
    answers_file = answers_stage(plan, target_name, loaded, folder, progress)
    answers = read_answers(answers_file, loaded.target.vocab_size, limit=plan.limit if plan.answers else None)
    split = split_answers(fitting(answers, plan, loaded, progress), plan.held_out, plan.seed)
    if not split.train or not split.held_out:
        raise ConfigError("too few answers: some must be trained on and some held out", param="answers")
    trainer = new_trainer(plan, loaded, split, folder, progress)
    with contextlib.closing(trainer):
        with asked_to_stop() as stop:
            finished = trainer.run(progress, stop)
        if not finished:
            return False
    save(trainer, out, folder)
    machine = hardware(trainer.device)  # before an engine on kernels of its own leaves torch only one thread
    fits = calibration_stage(plan, target_name, split, out, progress)
    write_text(out / "card.md", write_card(plan, trainer, split, loaded.name, folder, fits, machine))
    progress.say(f"the drafter is in {out}")
    if trainer.features.nbytes:
        size = trainer.features.nbytes / 2**30
        progress.say(f"{folder / 'features'} ({size:.1f} GiB) is of use only to train this run further")
    return True


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT has come, while this lasts. A second one ends the process as always."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)

    if threading.current_thread() is threading.main_thread():
        before.update({one: signal.signal(one, note) for one in (signal.SIGTERM, signal.SIGINT)})
    try:
        yield lambda: bool(asked)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


# --- answers -------------------------------------------------------------------------------------------------


def answers_stage(plan: TrainPlan, target_name: str, loaded: LoadedTarget, folder: Path, progress: Progress) -> Path:
    """The run's answers file, complete: a snapshot of the one given, or written by the target now."""
    path = folder / "answers.jsonl"
    if path.exists():
        return path
    if plan.answers is not None:
        return snapshot_answers(Path(plan.answers), path)
    if loaded.codec is None:
        raise ConfigError(f"{target_name} has no tokenizer: give --answers", param="prompts")
    read_files(plan.prompts)  # a broken line is to be said before anything is loaded to answer it
    threads = torch.get_num_threads()
    try:
        with contextlib.closing(open_writer(plan, target_name, loaded, progress)) as writer:
            return Scribe(plan, folder, writer, loaded.codec, progress).write_answers()
    finally:
        torch.set_num_threads(threads)  # an engine on kernels of its own leaves torch only one


def open_writer(plan: TrainPlan, target_name: str, loaded: LoadedTarget, progress: Progress) -> Writer:
    """Who writes this plan's texts, ready."""
    if choose_writer(plan.writer, target_name, loaded.target.device.type) == "openvino":
        progress.say("answers are written by OpenVINO GenAI")
        return OpenVinoWriter(
            target_name,
            loaded.target.eos_token_ids,
            streams=plan.streams,
            threads=plan.threads,
            max_model_len=loaded.target.max_positions,
        )
    config = Config(
        model=target_name, drafter="none", device=plan.device, threads=plan.threads, max_num_seqs=plan.streams
    )
    engine, _ = build_engine(config, progress)
    return EngineWriter(LocalEngine(engine), plan.streams, engine.info.max_model_len)


def snapshot_answers(source: Path, path: Path) -> Path:
    """Copy a given answers file into the run's folder: it may grow or go while the run goes on."""
    part = path.with_name("answers.jsonl.part")
    try:
        shutil.copyfile(source, part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"{source} cannot be copied to {path.parent}: {error}", param="answers") from error
    return path


def fitting(answers: list[Answer], plan: TrainPlan, loaded: LoadedTarget, progress: Progress) -> list[Answer]:
    """Answers that end, a block included, within the target's positions."""
    fit = [a for a in answers if len(a) + plan.block_size <= loaded.target.max_positions]
    if len(fit) < len(answers):
        progress.say(f"{len(answers) - len(fit)} answers are longer than the target's positions and left out")
    return fit


# --- training --------------------------------------------------------------------------------------------------


def new_drafter(plan: TrainPlan, loaded: LoadedTarget, answers: list[Answer]) -> Drafter:
    """A drafter that starts from the target, or another drafter; float32, on its device. Sets the target's taps."""
    target = loaded.target
    if plan.init is not None:
        drafter = load_drafter(Path(plan.init), target).to(torch.float32)
        return deepened(drafter, plan.add_layers).train().requires_grad_(True)
    taps = plan.taps or default_taps(target.num_layers)
    target.set_taps(taps)
    mask = plan.mask_token_id
    if mask is None:
        special: list[int] = []
        if loaded.codec is not None:
            special = [i for i, token in loaded.codec.raw.get_added_tokens_decoder().items() if token.special]
        mask = pick_mask_token(answers, target.vocab_size, special, target.eos_token_ids)
    elif not 0 <= mask < target.vocab_size:
        raise ConfigError(f"mask_token_id {mask} is not in the target's vocabulary", param="mask_token_id")
    size = plan.draft_vocab or target.vocab_size
    ids = None
    if size < target.vocab_size:
        ids = torch.tensor(draft_vocabulary(answers, size, target.vocab_size, target.eos_token_ids))
        ids = ids.to(target.device)
    config = DrafterConfig(
        backbone=backbone_config(target.config, plan.layers),
        num_layers=plan.layers,
        block_size=plan.block_size,
        mask_token_id=mask,
        target_layer_ids=taps,
        markov_rank=0 if plan.head == "none" else plan.rank,
        markov_head_type=plan.head if plan.head in ("gated", "rnn") else "vanilla",
        confidence_head_with_markov=plan.head != "none",
        num_anchors=plan.anchors,
        draft_vocab_size=None if ids is None else size,
    )
    drafter = Drafter(config, target, ids).to(device=target.device, dtype=torch.float32)
    start_from_target(drafter, target, plan.seed, layers_too=plan.start == "target")
    return drafter.requires_grad_(True)


def new_trainer(plan: TrainPlan, loaded: LoadedTarget, split: Split, folder: Path, progress: Progress) -> Trainer:
    """Drafter, features and the state that an earlier run left in ``folder``, if one did."""
    target = loaded.target
    drafter = new_drafter(plan, loaded, split.train)
    if can_pack(target.device, target.dtype):
        pack_linears(target.decoder)  # the LM head stays plain: its rows are the drafter's
    features = FeatureSource(
        folder / "features",
        target,
        # the held-out ones first, so that they are within the budget: they are read at every validation
        split.held_out + split.train,
        budget=plan.feature_budget,
        fingerprint=loaded.fingerprint,
    )
    features.prepare(progress)
    config = LoopConfig(
        steps=plan.steps,
        minutes=plan.minutes,
        batch=plan.batch,
        anchors=plan.anchors,
        lr=plan.lr,
        muon=plan.optimizer == "muon",
        seed=plan.seed,
        validate_every=plan.validate_every,
        checkpoint_minutes=plan.checkpoint_minutes,
    )
    trainer = Trainer(drafter, split.train, split.held_out, features, config, folder)
    if trainer.resume():
        progress.say(f"going on from step {trainer.step}")
    return trainer


def save(trainer: Trainer, out: Path, folder: Path) -> None:
    """Write the drafter and the plan; a calibration of earlier weights goes.

    Raises:
        ConfigError: no room; the run's state is still there, so nothing but this has to be done again.
    """
    try:
        (out / CALIBRATION_FILE).unlink(missing_ok=True)
        save_drafter(trainer.drafter, out)
    except (OSError, SafetensorError) as error:
        raise _unwritable(out, error) from error
    write_text(out / FILE, (folder / FILE).read_text())


def write_text(path: Path, text: str) -> None:
    """A file beside the weights.

    Raises:
        ConfigError: no room.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(out: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"the drafter cannot be written to {out}: {error}; run the same command again when there is room", param="out"
    )


def calibration_stage(
    plan: TrainPlan, target_name: str, split: Split, out: Path, progress: Progress
) -> dict[Acceptance, Fit]:
    """Calibrate the saved drafter on the held-out prompts, in the engine: what it is worth there, by way to accept."""
    streams = min(plan.streams, CALIBRATION_STREAMS)
    config = Config(model=target_name, drafter=str(out), device=plan.device, threads=plan.threads, max_num_seqs=streams)
    engine, _ = build_engine(calibration_config(config), progress)
    with LocalEngine(engine) as local:
        calibration, fits = calibrate(
            local,
            [a.prompt_ids for a in split.held_out],
            gamma=engine.info.gamma,
            max_model_len=engine.info.max_model_len,
            max_tokens=min(plan.answer_tokens, CALIBRATION_TOKENS),
            streams=streams,
            seed=plan.seed,
            progress=progress,
        )
    save_calibration(calibration, out)
    return fits
