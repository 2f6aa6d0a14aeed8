"""What a new drafter starts from, and that every family of targets can be trained for."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig, Qwen3Config

from dspark_stream.console import SILENT
from dspark_stream.errors import ConfigError
from dspark_stream.models.cache import Extent
from dspark_stream.models.checkpoint import save_drafter
from dspark_stream.models.loading import LoadedTarget
from dspark_stream.models.torch.drafter import Drafter
from dspark_stream.models.torch.layers import ATTENTION_NAME
from dspark_stream.models.torch.store import KVStore
from dspark_stream.models.torch.target import Target
from dspark_stream.training import pipeline
from dspark_stream.training.answers import Answer, Split
from dspark_stream.training.blocks import BlockAttend, make_batch
from dspark_stream.training.features import SelfAttend, compute_features
from dspark_stream.training.initial import deepened
from dspark_stream.training.plan import TrainPlan, shaped
from dspark_stream.training.validate import walk
from tiny import tiny_target

ANSWERS = [Answer((5, 6, 7), tuple((i * j) % 37 + 2 for j in range(20))) for i in range(1, 9)]


def plan(**values):
    return TrainPlan(**({"answers": "-", "steps": 3, "layers": 2, "rank": 4, "block_size": 3} | values))


def loaded(target):
    for name, parameter in target.model.named_parameters():
        if "norm" in name:  # all ones in a new model, which would hide a norm left out
            parameter.uniform_(0.5, 1.5)
    return LoadedTarget(target, None, "tiny", "")


class Recorder(SelfAttend):
    """Keeps each layer's keys and values."""

    def __init__(self, lengths):
        super().__init__(lengths)
        self.seen = {}

    def __call__(self, layer, query, key, value, **options):
        self.seen[layer] = (key, value)
        return super().__call__(layer, query, key, value, **options)


@pytest.mark.parametrize(("layers", "taps"), [(1, ()), (1, (-1, 1)), (2, (0,))])
def test_the_first_layer_starts_with_the_targets_own_context(layers, taps):
    """Its context keys and values are what the same layer of the target has, before any training."""
    target = tiny_target()
    drafter = pipeline.new_drafter(plan(layers=layers, taps=taps), loaded(target), ANSWERS)
    recorder = Recorder([len(ANSWERS[0])])
    ids, positions = torch.tensor(ANSWERS[0].ids), torch.arange(len(ANSWERS[0]))
    _, tapped = target.forward_with(ids, positions, recorder)
    with torch.no_grad():
        context = drafter.context_kv(0, drafter.context_features(tapped.clone()), *drafter.rope(positions))
    for got, want in zip(context, recorder.seen[target.num_layers - layers], strict=True):
        assert torch.allclose(got, want, atol=1e-4)


def test_layers_of_noise_can_be_asked_for():
    target = tiny_target()
    drafter = pipeline.new_drafter(plan(start="random"), loaded(target), ANSWERS)
    assert drafter.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert drafter.fc.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(drafter.layers[0].input_layernorm.weight, torch.ones(target.hidden_size))
    with pytest.raises(ConfigError, match="start 'other'"):
        plan(start="other")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_added_layers_change_nothing_until_they_are_trained(family):
    target = family_target(family)
    drafter = pipeline.new_drafter(plan(layers=1, draft_vocab=20), loaded(target), ANSWERS)
    drafter.config.backbone.rms_norm_eps *= 2  # its own, not the target's
    drafter = Drafter(drafter.config, target, drafter.draft_ids)
    with torch.no_grad():  # away from where it starts
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    drafter.requires_grad_(False)
    deeper = deepened(drafter, 2).requires_grad_(True)
    assert len(deeper.layers) == deeper.config.num_layers == deeper.config.backbone.num_hidden_layers == 3
    assert deeper.config.backbone.rms_norm_eps == drafter.config.backbone.rms_norm_eps
    assert all(torch.equal(deeper.state_dict()[name], tensor) for name, tensor in drafter.state_dict().items())
    assert torch.equal(deeper.draft_ids, drafter.draft_ids)
    features = compute_features(target, ANSWERS[:2])
    batch = make_batch(ANSWERS[:2], features, [torch.tensor([3, 9])] * 2, gamma=3, mask_id=drafter.config.mask_token_id)

    def hidden(of):
        return of.block_hidden(batch.block_ids, batch.block_positions, BlockAttend(of, batch))

    assert torch.equal(hidden(deeper), hidden(drafter))
    hidden(deeper).square().sum().backward()
    for layer in list(deeper.layers)[1:]:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert projection.weight.grad.abs().max() > 0  # so they do not stay as they are
    assert deepened(drafter, 0) is drafter


def test_layers_cannot_be_added_where_norms_follow_projections(tmp_path):
    drafter = pipeline.new_drafter(plan(layers=1), loaded(family_target("gemma4")), ANSWERS)
    save_drafter(drafter, tmp_path)
    with pytest.raises(ConfigError, match="gemma4_text"):
        shaped(plan(init=str(tmp_path), add_layers=1))
    assert shaped(plan(init=str(tmp_path))).layers == 1


def test_later_layers_keep_their_function_under_the_shared_norm():
    target = tiny_target()
    drafter = pipeline.new_drafter(plan(layers=2, taps=(0,)), loaded(target), ANSWERS)
    own, source = drafter.layers[1], target.decoder.layers[2]
    assert torch.equal(own.input_layernorm.weight, drafter.hidden_norm.weight)
    x = torch.randn(5, target.hidden_size)
    for name in ("q_proj", "k_proj", "v_proj"):
        got = getattr(own.self_attn, name)(own.input_layernorm(x))
        want = getattr(source.self_attn, name)(source.input_layernorm(x))
        assert torch.allclose(got, want, atol=1e-4)


def test_the_sequential_head_says_nothing_at_first():
    drafter = pipeline.new_drafter(plan(draft_vocab=20), loaded(tiny_target()), ANSWERS)
    assert drafter.draft_vocab_size == 20
    assert not drafter.markov_head.bias(drafter.markov_head.embed(torch.tensor([3]))).any()
    assert drafter.markov_head.markov_w1.weight.std().item() == pytest.approx(1, rel=0.1)


def family_target(family):
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    if family == "llama":
        return tiny_target()
    if family == "qwen3":
        config = Qwen3Config(**shape)
    else:
        config = Gemma4TextConfig(
            **shape, global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            num_kv_shared_layers=0, hidden_size_per_layer_input=0, final_logit_softcapping=5.0,
        )  # fmt: skip
    torch.manual_seed(0)
    return Target(AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma4"])
@pytest.mark.parametrize("head", ["markov", "gated", "rnn", "none"])
def test_every_family_and_head_learns_and_drafts_from_the_same_blocks(family, head, tmp_path):
    target = family_target(family)
    split = Split(ANSWERS[2:], ANSWERS[:2])
    run_plan = plan(head=head, draft_vocab=30, batch=6, anchors=20, lr=5e-3, steps=40)
    trainer = pipeline.new_trainer(run_plan, loaded(target), split, tmp_path, SILENT)
    drafter = trainer.drafter
    features = compute_features(target, ANSWERS[:1])
    batch = make_batch(
        ANSWERS[:1],
        features,
        trainer.anchors(ANSWERS[:1], 0),
        gamma=drafter.gamma,
        mask_id=drafter.config.mask_token_id,
    )
    losses = [trainer.train_step().total.item() for _ in range(40)]
    assert sum(losses[-5:]) / 5 < 0.95 * losses[0]
    assert set(walk(drafter, split.held_out, trainer.features.get([0, 1]))) == {""}
    drafter.eval()
    with torch.no_grad():
        hidden = drafter.block_hidden(batch.block_ids, batch.block_positions, BlockAttend(drafter, batch))
    p = int(batch.spans[0].anchors[-1])
    store = KVStore(drafter.kv_shapes, 64, torch.float32, target.device)
    drafter.append_context(features[0].taps[:p], list(range(p)), list(range(p)), store)
    drafted = drafter.draft_hidden([(Extent(0, 64), p, ANSWERS[0].ids[p])], store)[0]
    assert torch.allclose(hidden[-3:], drafted, atol=1e-3)
