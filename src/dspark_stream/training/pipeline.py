"""The stages of a training run, in order: texts → features → training → calibration → the drafter with its card.

Each stage leaves its result in the run's folder and starts where a killed one stopped::

    train.json     the plan
    lock           held while a run is at work
    answers.jsonl  what the target wrote (answering.py names the files on the way), or a snapshot of the file given
    features/      the target's hidden states, within the budget; needed only while training
    state.pt       weights, optimiser and place of the training
    log.csv        losses and held-out accepted lengths
    drafter/       the drafter in DeepSpec's format, its calibration, its card and the plan
    finished.json  the result: written last, so that the same command again leaves the drafter alone
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError

from dspark_kernels.linear import can_pack, pack_linears
from dspark_stream.config import Config, default_cache_dir
from dspark_stream.console import SILENT, Progress
from dspark_stream.decoding.calibration import CALIBRATION_FILE, save_calibration
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.local import LocalEngine
from dspark_stream.errors import ConfigError
from dspark_stream.files import write_whole
from dspark_stream.measure.calibrate import Fit, calibrate, calibration_config
from dspark_stream.models.checkpoint import load_drafter, save_drafter
from dspark_stream.models.drafter_config import DrafterConfig
from dspark_stream.models.fetch import model_path
from dspark_stream.models.loading import LoadedTarget, load_target
from dspark_stream.models.torch.drafter import Drafter, backbone_config
from dspark_stream.training.answering import Scribe, given_prompts
from dspark_stream.training.answers import Answer, Split, draft_vocabulary, read_answers, split_answers
from dspark_stream.training.card import CARD, Trained, write_card
from dspark_stream.training.features import FeatureSource
from dspark_stream.training.initial import deepened, default_taps, pick_mask_token, start_from_target
from dspark_stream.training.loop import LoopConfig, Trainer
from dspark_stream.training.plan import ANSWERS, FILE, HOW, TrainPlan, unlike
from dspark_stream.training.writers import EngineWriter, OpenVinoWriter, Writer, choose_writer
from dspark_stream.types import Acceptance

FINISHED = "finished.json"
CALIBRATION_STREAMS = 16
CALIBRATION_TOKENS = 256


def run_stages(plan: TrainPlan, folder: Path, out: Path, progress: Progress) -> bool:
    """All stages; False where a signal ended the training early (its state is saved).

    One stage's models are gone before the next one's are loaded, so that the target is held once.

    Raises:
        DsparkError: whatever cannot be used or written, said in words; what is done is kept.
    """
    if is_finished(plan, folder, out):
        progress.say(f"nothing is left to do: the drafter is in {out}")
        return True
    target_name = model_path(plan.target, default_cache_dir(), progress)
    trained = training_stage(
        plan, target_name, answers_stage(plan, target_name, folder, progress), folder, out, progress
    )
    if trained is None:
        return False
    fits = calibration_stage(plan, target_name, trained.split, out, progress)
    try:
        write_whole(out / CARD, write_card(plan, trained, folder, fits))
        write_whole(folder / FINISHED, finish(plan, out))
    except OSError as error:
        raise _unwritable(out, error) from error
    progress.say(f"the drafter is in {out}")
    if trained.feature_bytes:
        size = trained.feature_bytes / 2**30
        progress.say(f"{folder / 'features'} ({size:.1f} GiB) is of use only to train this run further")
    return True


def finish(plan: TrainPlan, out: Path) -> str:
    """What a run's folder remembers of its end: what was trained, and which weights that gave where."""
    weights = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    return json.dumps({"plan": asdict(plan), "out": str(out.resolve()), "weights": weights}, indent=2) + "\n"


def is_finished(plan: TrainPlan, folder: Path, out: Path) -> bool:
    """Whether the run in ``folder`` has come to this plan's end, and its weights are still in ``out``."""
    try:
        then, now = json.loads((folder / FINISHED).read_text()), json.loads(finish(plan, out))
        differing = unlike(then.pop("plan"), now.pop("plan"))
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return not differing.keys() - HOW and then == now


def load(plan: TrainPlan, target_name: str, progress: Progress) -> LoadedTarget:
    """The target, on the plan's device."""
    give_memory_back()
    with progress.stage(f"loading {target_name}"):
        return load_target(target_name, device=plan.device)


def give_memory_back() -> None:
    """What nobody holds any more, the GPU's too: an engine takes what it finds free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT has come, while this lasts. A second one ends the process as always."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)
        # not by `Progress`, whose lock this very thread may hold; and who reads what it says may be gone
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; once more ends it now, without what is not saved yet\n")

    if threading.current_thread() is threading.main_thread():
        before.update({one: signal.signal(one, note) for one in (signal.SIGTERM, signal.SIGINT)})
    try:
        yield lambda: bool(asked)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


# --- answers -------------------------------------------------------------------------------------------------


def answers_stage(plan: TrainPlan, target_name: str, folder: Path, progress: Progress) -> LoadedTarget | None:
    """The run's answers file, complete: a snapshot of the one given, or written by the target now.

    What could be refused of the plan is refused here, before hours of writing. Returns the target if it is still there.
    """
    if (folder / ANSWERS).exists():
        return None
    prompts = [] if plan.answers else given_prompts(plan, folder, progress)
    loaded = load(plan, target_name, progress)
    target, codec = loaded.target, loaded.codec
    if plan.answers is not None:
        new_drafter(plan, loaded, usable_answers(plan, loaded, Path(plan.answers), SILENT).train)
        snapshot_answers(Path(plan.answers), folder / ANSWERS)
        return loaded
    new_drafter(plan, loaded, [])
    if codec is None:
        raise ConfigError(f"{target_name} has no tokenizer: give --answers", param="prompts")
    name = choose_writer(plan.writer, target_name, target.device.type)
    stop_ids, max_positions = target.eos_token_ids, target.max_positions
    del loaded, target
    give_memory_back()
    threads = torch.get_num_threads()
    try:
        with contextlib.closing(open_writer(plan, name, target_name, stop_ids, max_positions, progress)) as writer:
            Scribe(plan, folder, prompts, writer, codec, progress).write_answers()
    finally:
        torch.set_num_threads(threads)  # an engine on kernels of its own leaves torch only one
    return None


def open_writer(
    plan: TrainPlan, name: str, target_name: str, stop_ids: Sequence[int], max_positions: int, progress: Progress
) -> Writer:
    """Who writes this plan's texts (``name`` of `choose_writer`), ready."""
    if name == "openvino":
        progress.say("answers are written by OpenVINO GenAI")
        return OpenVinoWriter(
            target_name, stop_ids, streams=plan.streams, threads=plan.threads, max_model_len=max_positions
        )
    config = Config(
        model=target_name, drafter="none", device=plan.device, threads=plan.threads, max_num_seqs=plan.streams
    )
    engine, _ = build_engine(config, progress)
    return EngineWriter(LocalEngine(engine), plan.streams, engine.info.max_model_len)


def snapshot_answers(source: Path, path: Path) -> None:
    """Copy a given answers file into the run's folder: it may grow or go while the run goes on."""
    part = path.with_name(path.name + ".part")
    try:
        shutil.copyfile(source, part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"{source} cannot be copied to {path.parent}: {error}", param="answers") from error


def usable_answers(plan: TrainPlan, loaded: LoadedTarget, path: Path, progress: Progress) -> Split:
    """Answers to train on and to hold out.

    Raises:
        ConfigError: the file cannot be read, or there are too few in it.
    """
    limit = plan.limit if plan.answers else None
    answers = fitting(
        read_answers(path, loaded.target.vocab_size, limit=limit, progress=progress), plan, loaded, progress
    )
    split = split_answers(answers, plan.held_out, plan.seed)
    if not split.train or not split.held_out:
        raise ConfigError(
            f"{path}: too few answers: of {len(answers)}, {len(split.train)} are to be trained on and "
            f"{len(split.held_out)} held out, and neither may be none",
            param="answers",
        )
    tokens = sum(len(a.answer_ids) for a in split.train)
    progress.say(f"{len(split.train)} answers of {tokens} tokens to train on, {len(split.held_out)} held out")
    return split


def fitting(answers: list[Answer], plan: TrainPlan, loaded: LoadedTarget, progress: Progress) -> list[Answer]:
    """Answers that end, a block included, within the target's positions."""
    fit = [a for a in answers if len(a) + plan.block_size <= loaded.target.max_positions]
    if len(fit) < len(answers):
        progress.say(f"{len(answers) - len(fit)} answers are longer than the target's positions and left out")
    return fit


# --- training --------------------------------------------------------------------------------------------------


def training_stage(
    plan: TrainPlan, target_name: str, loaded: LoadedTarget | None, folder: Path, out: Path, progress: Progress
) -> Trained | None:
    """Train to the plan's end and save the drafter; None where a signal ended it early."""
    loaded = loaded or load(plan, target_name, progress)
    split = usable_answers(plan, loaded, folder / ANSWERS, progress)
    trainer = new_trainer(plan, loaded, split, folder, progress)
    with contextlib.closing(trainer):
        with asked_to_stop() as stop:
            finished = trainer.run(progress, stop)
        if not finished:
            return None
    save(trainer, out, folder)
    return Trained.by(trainer, split, loaded.name)


def new_drafter(plan: TrainPlan, loaded: LoadedTarget, answers: list[Answer]) -> Drafter:
    """A drafter that starts from the target, or another drafter; float32, on its device. Sets the target's taps."""
    target = loaded.on_torch
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
    target = loaded.on_torch
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
    trainer.began_with = loaded.fingerprint
    if trainer.resume():
        progress.say(f"going on from step {trainer.step}")
        if trainer.began_with not in (None, loaded.fingerprint):
            progress.say(f"{plan.target} is of another name, size or time than at the beginning: it is taken as it is")
    return trainer


def save(trainer: Trainer, out: Path, folder: Path) -> None:
    """Write the drafter and the plan; calibration and card of earlier weights go.

    Raises:
        ConfigError: no room. What was in ``out`` is still there, and so is the run's state: nothing but this has to be
            done again. (A kill between the last renames leaves a mixture, which the same command mends.)
    """
    new = out / "drafter.part"
    try:
        save_drafter(trainer.drafter, new)
        shutil.copyfile(folder / FILE, new / FILE)
        for stale in (folder / FINISHED, out / CARD, out / CALIBRATION_FILE):
            stale.unlink(missing_ok=True)
        for name in ("model.safetensors", "config.json", FILE):
            (new / name).replace(out / name)
    except (OSError, SafetensorError) as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _unwritable(out: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"the drafter cannot be written to {out}: {error}; run the same command again when it can", param="out"
    )


def calibration_stage(
    plan: TrainPlan, target_name: str, split: Split, out: Path, progress: Progress
) -> dict[Acceptance, Fit]:
    """Calibrate the saved drafter on the held-out prompts, in the engine: what it is worth there, by way to accept."""
    give_memory_back()
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
