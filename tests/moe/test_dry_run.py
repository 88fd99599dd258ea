"""The dry run: targets whose rows mix sequences are errors by name, targets that never run are left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertModel, PretrainedConfig, PreTrainedModel, ViTConfig, ViTModel

from taskmoe.moe import ConfigError, RowSpaceError, TaskMoEConfig, attach
from taskmoe.moe.dry_run import example_inputs

CONFIG = TaskMoEConfig(r=2, num_experts=3)


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, vocab_size=31, hidden_size=8, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size


class Toy(PreTrainedModel):
    """An embedding, a sound linear, and ``middle``: what a subclass adds between them."""

    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(64, width)
        self.odd = nn.Linear(width, width)
        self.sound = nn.Linear(width, width)

    def get_input_embeddings(self):
        return self.embed

    def middle(self, hidden):
        return hidden

    def forward(self, input_ids, attention_mask=None):
        return self.sound(self.middle(self.embed(input_ids)))


class OverPositions(Toy):
    def middle(self, hidden):
        return hidden + self.odd(self.positions.weight[: hidden.shape[1]])


class PositionsPerSequence(Toy):
    """As many rows as the batch has, but they say nothing about it."""

    def middle(self, hidden):
        return hidden + self.odd(self.positions.weight[: hidden.shape[1]].expand_as(hidden))


class SequenceFirst(Toy):
    def middle(self, hidden):
        return self.odd(hidden.transpose(0, 1)).transpose(0, 1)


class MixesSequences(Toy):
    def middle(self, hidden):
        return self.odd(hidden + hidden.mean(0, keepdim=True))


class Dispatch(Toy):
    """Rows go where a router of tokens sends them."""

    def middle(self, hidden):
        rows = hidden.flatten(0, 1)
        kept = rows.sum(-1) > 0
        return rows.index_put((kept,), self.odd(rows[kept])).view_as(hidden)


class Sorted(Toy):
    def middle(self, hidden):
        rows = hidden.flatten(0, 1)
        order = rows.sum(-1).argsort()
        return self.odd(rows[order])[order.argsort()].view_as(hidden)


class OneRow(Toy):
    def middle(self, hidden):
        return hidden + self.odd(hidden.mean((0, 1)))


@pytest.mark.parametrize(
    "model", [OverPositions, PositionsPerSequence, SequenceFirst, MixesSequences, Dispatch, Sorted, OneRow]
)
def test_rows_that_are_not_one_sequences_are_an_error_by_name(model):
    torch.manual_seed(0)
    base = model(ToyConfig())
    with pytest.raises(
        RowSpaceError, match=r"^odd: its input has leading shape .*exclude it with exclude_modules"
    ):
        attach(base, CONFIG, 2)
    assert not any(type(m).__name__ == "MoELinear" for m in base.modules())
    if model in (MixesSequences, OneRow):  # what comes after reads all sequences as well
        return
    attached = attach(base, TaskMoEConfig(r=2, num_experts=3, exclude_modules=("odd",)), 2)
    assert attached.routing.groups == ["sound"]


def test_a_target_that_never_runs_is_left_out_and_listed():
    model = attach(Toy(ToyConfig()), CONFIG, 2)
    assert model.not_run == ["odd"]
    assert model.routing.groups == ["sound"]
    assert isinstance(model.base_model.odd, nn.Linear)
    with pytest.raises(ConfigError, match=r"target_modules: a forward pass runs none of odd"):
        attach(Toy(ToyConfig()), TaskMoEConfig(target_modules=("odd",)), 2)
    whole = attach(Toy(ToyConfig()), CONFIG, 2, dry_run=False)
    assert whole.routing.groups == ["odd", "sound"]


def test_a_pooler_that_is_not_there_is_no_target(tiny):
    base = BertModel(tiny("bert").config, add_pooling_layer=False)
    assert "pooler.dense" not in attach(base, CONFIG, 2).routing.groups


@pytest.mark.parametrize("vocab", [2, 3, 5, 8, 9, 11])
def test_the_smallest_vocabularies(vocab):
    torch.manual_seed(0)
    assert attach(Toy(ToyConfig(vocab_size=vocab)), CONFIG, 2).routing.groups == ["sound"]


def test_the_model_is_left_as_it_was(tiny):
    base = tiny("bert").train()
    before = {n: p.clone() for n, p in base.named_parameters()}
    attach(base, CONFIG, 2)
    assert base.training
    assert not any(m._forward_pre_hooks for m in base.modules())
    own = dict(base.named_parameters())
    for name, p in before.items():
        moved = name.replace("weight", "base.weight").replace("bias", "base.bias")
        now = own[name] if name in own else own[moved]
        assert torch.equal(now, p), name
        assert now.grad is None


def test_a_model_that_cannot_be_run_says_what_to_do():
    class Needs(Toy):
        def forward(self, input_ids, attention_mask=None, *, speaker):
            return self.sound(self.embed(input_ids) + speaker)

    base = Needs(ToyConfig())
    with pytest.raises(ConfigError, match=r"dry run of Needs failed \(TypeError.*speaker.*example_inputs"):
        attach(base, CONFIG, 2)
    inputs = {"input_ids": torch.randint(0, 31, (3, 4)), "speaker": torch.zeros(1)}
    assert attach(base, CONFIG, 2, example_inputs=inputs).routing.groups == ["sound"]


def test_inputs_of_a_vision_model(batch, gradients):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    model = attach(ViTModel(config), CONFIG, 2)
    assert "pooler.dense" in model.routing.groups
    pixels = example_inputs(model.base_model)["pixel_values"]
    for step in range(2):
        out = model(pixel_values=pixels, task_ids=[0, 1, 0]).pooler_output
        found = gradients(model, (out * torch.randn_like(out)).sum())
        if step == 0:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.endswith("B_ErN"):
                        p.normal_()
    assert all(g.any() for g in found.values())


def test_other_inputs_are_asked_for():
    class Sound(Toy):
        main_input_name = "input_values"

    with pytest.raises(
        ConfigError, match=r"Sound takes input_values: pass attach\(\.\.\., example_inputs=\)"
    ):
        attach(Sound(ToyConfig()), CONFIG, 2)
