"""The stages of a training run, in order: answers → features → training → saved drafter with its card.

Each stage leaves its result in the run's folder and starts where a killed one stopped::

    train.json     the plan
    answers.jsonl  what the target wrote, or a snapshot of the file given
    features/      the target's hidden states, within the budget; needed only while training
    state.pt       weights, optimiser and place of the training
    log.csv        losses and held-out accepted lengths
    drafter/       the drafter in DeepSpec's format, its card and the plan
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from dspark_kernels.linear import can_pack, pack_linears
from dspark_stream.config import Config, default_cache_dir
from dspark_stream.engine.build import build_engine
from dspark_stream.errors import ConfigError
from dspark_stream.local import LocalEngine
from dspark_stream.models.checkpoint import save_drafter
from dspark_stream.models.drafter import Drafter, DrafterConfig, backbone_config
from dspark_stream.models.embedded import ensure_embedded_model
from dspark_stream.models.loading import LoadedTarget, load_target
from dspark_stream.progress import Progress
from dspark_stream.training.answering import write_answers
from dspark_stream.training.answers import Answer, Split, draft_vocabulary, read_answers, split_answers
from dspark_stream.training.card import write_card
from dspark_stream.training.features import FeatureSource
from dspark_stream.training.initial import default_taps, pick_mask_token, start_from_target
from dspark_stream.training.loop import LoopConfig, Trainer
from dspark_stream.training.plan import FILE, TrainPlan


def run_stages(plan: TrainPlan, folder: Path, out: Path, progress: Progress, stop: Callable[[], bool]) -> bool:
    """All stages; False where ``stop`` ended the training early (its state is saved).

    Raises:
        DsparkError: whatever cannot be used or written, said in words; what is done is kept.
    """
    target_name = plan.target
    if target_name == "embedded":
        target_name = str(ensure_embedded_model(default_cache_dir(), progress))
    answers_file = answers_stage(plan, target_name, folder, progress)
    with progress.stage(f"loading {target_name}"):
        loaded = load_target(target_name, device=plan.device)
    answers = read_answers(answers_file, loaded.target.vocab_size, limit=plan.limit)
    split = split_answers(fitting(answers, plan, loaded, progress), plan.held_out, plan.seed)
    if not split.train or not split.held_out:
        raise ConfigError("too few answers: some must be trained on and some held out", param="answers")
    trainer = new_trainer(plan, loaded, split, folder, progress)
    if not trainer.run(progress, stop):
        return False
    save(trainer, out, folder, write_card(plan, trainer, split, loaded.name, folder))
    progress.say(f"the drafter is in {out}")
    if trainer.features.nbytes:
        size = trainer.features.nbytes / 2**30
        progress.say(f"{folder / 'features'} ({size:.1f} GiB) is of use only to train this run further")
    return True


# --- answers -------------------------------------------------------------------------------------------------


def answers_stage(plan: TrainPlan, target_name: str, folder: Path, progress: Progress) -> Path:
    """The run's answers file, complete: a snapshot of the one given, or written by the target now."""
    path = folder / "answers.jsonl"
    if path.exists():
        return path
    if plan.answers is not None:
        return snapshot_answers(Path(plan.answers), path)
    config = Config(
        model=target_name, drafter="none", device=plan.device, threads=plan.threads, max_num_seqs=plan.streams
    )
    engine, codec = build_engine(config, progress)
    with LocalEngine(engine) as local:
        if codec is None:
            raise ConfigError(f"{target_name} has no tokenizer: give --answers", param="prompts")
        return write_answers(plan, folder, local, codec, engine.info.max_model_len, progress)


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
    """A drafter that starts from the target, float32, on its device. Sets the target's taps."""
    target = loaded.target
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
        markov_head_type="vanilla" if plan.head == "none" else plan.head,
        confidence_head_with_markov=plan.head != "none",
        num_anchors=plan.anchors,
        draft_vocab_size=None if ids is None else size,
    )
    drafter = Drafter(config, target, ids).to(device=target.device, dtype=torch.float32)
    start_from_target(drafter, target, plan.seed)
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
        seed=plan.seed,
        validate_every=plan.validate_every,
        checkpoint_minutes=plan.checkpoint_minutes,
    )
    trainer = Trainer(drafter, split.train, split.held_out, features, config, folder)
    if trainer.resume():
        progress.say(f"going on from step {trainer.step}")
    return trainer


def save(trainer: Trainer, out: Path, folder: Path, card: str) -> None:
    """Write the drafter, its card and the plan.

    Raises:
        ConfigError: no room; the run's state is still there, so nothing but this has to be done again.
    """
    try:
        save_drafter(trainer.drafter, out)
        (out / "card.md").write_text(card, encoding="utf-8")
        shutil.copyfile(folder / FILE, out / FILE)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the drafter cannot be written to {out}: {error}; run the same command again when there is room",
            param="out",
        ) from error
