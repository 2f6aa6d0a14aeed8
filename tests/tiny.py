"""Tiny real models: random weights, a few thousand parameters, deterministic."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders
from tokenizers import models as token_models
from transformers import LlamaConfig, LlamaForCausalLM

from dspark_stream.decoding.calibration import Calibration
from dspark_stream.decoding.schedule import Adaptive, Schedule
from dspark_stream.decoding.survival import AcceptanceHistory
from dspark_stream.engine.eager import EagerRounds
from dspark_stream.engine.rounds import Models, Rounds
from dspark_stream.engine.worker import EngineThread
from dspark_stream.load.controller import Controller
from dspark_stream.load.costs import CapacityCurve
from dspark_stream.models.cache import ExtentAllocator
from dspark_stream.models.drafter_config import DrafterConfig
from dspark_stream.models.tokenizer import TokenBytes
from dspark_stream.models.torch.drafter import Drafter, backbone_config
from dspark_stream.models.torch.layers import ATTENTION_NAME
from dspark_stream.models.torch.store import KVStore
from dspark_stream.models.torch.target import Target
from dspark_stream.types import GenerationRequest, ModelInfo, SamplingParams

VOCAB = 48
GAMMA = 4
FLAT = CapacityCurve(tokens=[1, 64], verify_ms=[1.0, 2.0], streams=[1, 16], draft_ms=[0.1, 0.2], gamma=16)
"""A machine on which drafting nearly always pays."""


def letters() -> TokenBytes:
    """48 tokens, one visible character each, stored as bytes."""
    raw = Tokenizer(token_models.BPE(vocab={chr(48 + i): i for i in range(48)}, merges=[]))
    raw.decoder = decoders.ByteLevel()
    return TokenBytes(raw)


def tiny_target(seed: int = 0, vocab: int = VOCAB, **options: object) -> Target:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48} | options
    config = LlamaConfig(
        vocab_size=vocab,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
        attn_implementation=ATTENTION_NAME,
        **shape,
    )
    return Target(LlamaForCausalLM(config), eos_token_ids=(1,))


def tiny_drafter(
    target: Target,
    seed: int = 1,
    head: str = "vanilla",
    draft_vocab: int | None = None,
    gamma: int = GAMMA,
    rank: int = 8,
    **options,
) -> Drafter:
    torch.manual_seed(seed)
    config = DrafterConfig(
        backbone=backbone_config(target.config, 1),
        num_layers=1,
        block_size=gamma,
        mask_token_id=0,
        target_layer_ids=(-1, 1),
        markov_rank=0 if head == "none" else rank,
        markov_head_type="vanilla" if head == "none" else head,
        **options,
    )
    target.set_taps(config.target_layer_ids)
    ids = None if draft_vocab is None else torch.randperm(target.vocab_size)[:draft_vocab].sort().values
    drafter = Drafter(config, target, ids)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter.eval().requires_grad_(False)


def tiny_rounds(
    target: Target | None = None,
    drafter: Drafter | None = None,
    *,
    schedule: Schedule | None = None,
    slots: int = 2048,
    capacity: CapacityCurve = FLAT,
    **options,
) -> EagerRounds:
    target = target or tiny_target()
    gamma = drafter.gamma if drafter else 0
    models = Models(
        target=target,
        target_kv=KVStore(target.kv_shapes, slots, target.dtype, target.device),
        drafter=drafter,
        drafter_kv=KVStore(drafter.kv_shapes, slots, target.dtype, target.device) if drafter else None,
        calibration=Calibration(),
        history=AcceptanceHistory(gamma),
        capacity=capacity,
        controller=Controller(gamma, capacity),
    )
    models.controller.costs.learn = lambda *_: None  # the machine of an invented curve does not change
    return EagerRounds(models, schedule or Adaptive(), **options)


def tiny_engine(
    rounds: Rounds | None = None, *, slots: int = 2048, max_num_seqs: int = 8, text=None, **options
) -> EngineThread:
    if rounds is None:
        target = tiny_target()
        rounds = tiny_rounds(target, tiny_drafter(target), slots=slots)
    models = rounds.models
    info = ModelInfo(
        model="tiny",
        drafter="tiny" if models.drafter else None,
        gamma=models.gamma,
        vocab_size=models.target.vocab_size,
        max_model_len=256,
        max_num_seqs=max_num_seqs,
        max_token_bytes=4,
        dtype="float32",
        device="cpu",
        target_quant="none",
        draft_quant="none",
        schedule="adaptive",
    )
    return EngineThread(rounds, info, ExtentAllocator(slots), text, **options)


def request(name: str = "r", prompt: tuple[int, ...] = (5, 6, 7, 8), **options) -> GenerationRequest:
    outer = {k: options.pop(k) for k in ("mode", "verification", "record_rounds", "max_chunk_gap_ms") if k in options}
    options.setdefault("max_tokens", 24)
    options.setdefault("temperature", 0.0)
    return GenerationRequest(request_id=name, prompt_ids=prompt, sampling=SamplingParams(**options), **outer)
