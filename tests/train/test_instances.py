"""Embeddings of instances and their centroids: by hand, from training rows alone, into the model and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast

from taskmoe.moe import ConfigError, TaskMoEConfig
from taskmoe.train.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    MixingConfig,
    PhaseConfig,
    SkillGymConfig,
    TokenizerConfig,
)
from taskmoe.train.config_checks import validate
from taskmoe.train.distributed import Ranks
from taskmoe.train.instances import COLUMN, InstanceEncoder, hashed_words, kmeans, router_options
from taskmoe.train.loop import train
from taskmoe.train.objectives import model_inputs
from taskmoe.train.run_eval import score_run
from taskmoe.train.setup import build_data

DIM, CLUSTERS = 12, 3
MOE = TaskMoEConfig(
    r=1, num_experts=CLUSTERS, router="token_cluster", gate="raw", router_options={"dim": DIM, "speed": 10.0}
)
GYM = SkillGymConfig(
    num_tasks=3, num_skills=3, train_rows=24, validation_rows=4, test_rows=4, alphabet_size=6
)
BASE = Config(
    model={
        "type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
    tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=32),
    moe=MOE,
    data=DataConfig(skill_gym=GYM, max_length=40),
    mixing=MixingConfig(strategy="equal"),
    max_steps=6,
    per_device_train_batch_size=6,
    learning_rate=1e-2,
    warmup_ratio=0.0,
    phases=(PhaseConfig(train=("base", "experts", "router")),),
    evaluation=EvaluationConfig(max_new_tokens=3),
    report_to=("none",),
)  # fmt: skip
ALONE = Ranks(0, 1, 0, torch.device("cpu"), owns_group=False)


def read(config: Config, *splits: str):
    return build_data(config, ALONE, splits, None, None, lambda line: None)


def nearest(points_ND: Tensor, centroids_CD: Tensor) -> float:
    """Mean squared distance to the nearest centroid, pair by pair."""
    distances = [min(float((p - c).square().sum()) for c in centroids_CD) for p in points_ND]
    return sum(distances) / len(distances)


# -- embeddings ----------------------------------------------------------------------------------------------


def test_words_are_counted_in_cells_that_are_the_same_everywhere():
    counts = hashed_words(["b a a", "A", "", "c"], 7)
    assert counts.sum(1).tolist() == [3, 1, 0, 1]
    cells = {"a": 0xE8B7BE43 % 7, "b": 0x71BEEFF9 % 7}  # CRC-32 of the letters
    assert counts[1].nonzero().flatten().tolist() == [cells["a"]]
    assert counts[0, cells["a"]] >= 2
    assert counts[0, cells["b"]] >= 1


def test_embeddings_have_unit_length():
    found = InstanceEncoder("hashed_words", DIM)(["x y z", "x", ""])
    assert found.shape == (3, DIM)
    assert torch.allclose(found.norm(dim=1), torch.tensor([1.0, 1.0, 0.0]))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A tiny BERT and its tokenizer in a folder."""
    folder = tmp_path / "encoder"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(vocab_size=len(words), hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=8)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_model_gives_the_mean_over_its_tokens_whatever_stands_beside_them(encoder: Path):
    texts = ["a b", "c d e f a b", "f"]
    embed = InstanceEncoder(str(encoder), DIM)
    found = embed(texts)
    model, tokenizer = BertModel.from_pretrained(encoder).eval(), BertTokenizerFast.from_pretrained(encoder)
    for text, embedding in zip(texts, found, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert torch.allclose(embedding, mean / mean.norm(), atol=1e-5)
    assert torch.allclose(embed(texts[:1]), found[:1], atol=1e-5)


def test_an_encoder_that_does_not_fit_is_named(encoder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"moe\.router_options\.dim: 5, but .* has {DIM}"):
        InstanceEncoder(str(encoder), 5)
    with pytest.raises(ConfigError, match=r"moe\.router_options\.encoder: .*nowhere"):
        InstanceEncoder(str(tmp_path / "nowhere"), DIM)


# -- centroids -----------------------------------------------------------------------------------------------


def test_separate_clouds_get_a_centroid_each():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = (centres[:, None] + torch.randn(4, 30, 2, generator=generator)).flatten(0, 1)
    for seed in range(5):
        found = kmeans(points, 4, seed)
        assert found.dtype == torch.float32
        order = torch.cdist(centres, found).argmin(1)
        assert sorted(order.tolist()) == [0, 1, 2, 3]
        assert torch.allclose(found[order], points.view(4, 30, 2).mean(1), atol=1e-5)


def test_centroids_are_means_of_their_points_and_depend_on_the_seed_alone():
    points = torch.randn(80, 5, generator=torch.Generator().manual_seed(1))
    found = kmeans(points, 6, seed=3)
    assert torch.equal(found, kmeans(points, 6, seed=3))
    owners = torch.cdist(points.double(), found.double()).argmin(1)
    for c in range(6):
        assert torch.allclose(found[c], points[owners == c].mean(0), atol=1e-5)
    assert nearest(points, found) < nearest(points, kmeans(points, 6, seed=3, rounds=0))


def test_fewer_points_than_clusters_repeat():
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = kmeans(points, 4, seed=0)
    assert found.shape == (4, 2)
    assert nearest(points, found) == 0
    with pytest.raises(ConfigError, match="training instances"):
        kmeans(points[:0], 4, seed=0)


# -- in a run ------------------------------------------------------------------------------------------------


def test_rows_carry_the_embedding_of_their_prompt_into_batches():
    data = read(BASE, "train", "validation")
    embed = InstanceEncoder("hashed_words", DIM)
    for of_tasks in data.bundle.splits.values():
        for split in of_tasks:
            found = torch.tensor(split.tokens[COLUMN][:])
            assert torch.allclose(found, embed([row["prompt"] for row in split.raw]))
    splits = data.bundle.splits["train"]
    rows = [{**splits[t].tokens[i], "task": t} for t, i in ((2, 3), (0, 1), (1, 0))]
    for batch in (data.collator(rows), data.collator.prompts(rows)):
        expected = torch.tensor([rows[i][COLUMN] for i in batch["order"]])
        assert torch.equal(batch["instance_embeddings"], expected)
    inputs = model_inputs(data.collator(rows), "CAUSAL_LM", None, "cpu")
    assert torch.equal(inputs["instance_embeddings"], data.collator(rows)["instance_embeddings"])


def test_other_routers_cost_nothing():
    config = replace(BASE, moe=TaskMoEConfig(r=1, num_experts=CLUSTERS))
    assert router_options(config) is None
    data = read(config, "train")
    assert COLUMN not in data.bundle.splits["train"][0].tokens.column_names
    row = {**data.bundle.splits["train"][0].tokens[0], "task": 0}
    assert "instance_embeddings" not in data.collator([row])


def test_packed_rows_are_refused():
    packed = replace(BASE, data=replace(BASE.data, packing=True))
    with pytest.raises(ConfigError, match=r"data\.packing: moe\.router 'token_cluster' takes no rows of sev"):
        validate(packed)


def test_a_run_saves_the_centroids_of_its_training_rows_and_is_scored_with_them(tmp_path: Path):
    config = replace(BASE, output_dir=str(tmp_path / "run"))
    assert train(config) == 0
    state = load_file(tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors")
    saved = [t for n, t in state.items() if n.endswith("centroids_ED")]
    assert saved
    rows = [torch.tensor(s.tokens[COLUMN][:]) for s in read(BASE, "train").bundle.splits["train"]]
    expected = kmeans(torch.cat(rows), CLUSTERS, BASE.seed)
    assert all(torch.equal(centroids, expected) for centroids in saved)
    assert {n.rpartition(".")[2] for n in state} >= {"omega_1", "beta_1", "weight_E1K", "A_ErK", "B_ErN"}
    assert all(t.any() for n, t in state.items() if n.endswith(("omega_1", "beta_1")))
    _, found = score_run(str(tmp_path / "run"), [], "test")
    assert len(found["tasks"]) == 3


def test_a_resumed_run_keeps_the_centroids_it_began_with(tmp_path: Path):
    config = replace(BASE, output_dir=str(tmp_path / "run"), save_steps=3, save_total_limit=9)
    assert train(config) == 0
    whole = load_file(tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors")
    again = replace(config, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert train(again) == 0
    resumed = load_file(tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_the_bias_of_ranks_follows_the_steps_of_a_run(tmp_path: Path):
    """After n steps each bias is a multiple of the step, no larger than n, and some have moved."""
    options = {"top_k": 2, "bias_step": 1 / 64}
    moe = TaskMoEConfig(r=1, num_experts=4, router="ranks", gate="raw", router_options=options)
    config = replace(
        BASE, moe=moe, output_dir=str(tmp_path / "run"), gradient_accumulation_steps=2, max_steps=5
    )
    assert train(config) == 0
    state = load_file(tmp_path / "run" / "checkpoint-5" / "adapter_model.safetensors")
    biases = [t for n, t in state.items() if n.endswith("bias_E")]
    assert biases
    assert not any(n.endswith("count_E") for n in state)
    for bias in biases:
        steps = bias * 64
        assert torch.equal(steps, steps.round())
        assert bias.any()  # an odd number of steps up and down
        assert float(steps.abs().max()) <= 5
