"""Vectors of tasks from gradients: by definition, from the rows of a run, and in the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from taskmoe.moe import ConfigError, TaskMoEConfig
from taskmoe.moe.choices import check_methods
from taskmoe.moe.options import options_of
from taskmoe.moe.representations.files import read_vectors
from taskmoe.moe.representations.fisher import FisherVectors
from taskmoe.train.config import Config, DataConfig, MixingConfig, PhaseConfig, TokenizerConfig
from taskmoe.train.distributed import Ranks
from taskmoe.train.fisher import fisher_of_rows, fisher_vectors, pca, sketch
from taskmoe.train.loop import train
from taskmoe.train.models import build_model
from taskmoe.train.setup import Data, build_data

ALONE = Ranks(0, 1, 0, torch.device("cpu"), owns_group=False)
NAME = "routing.representation.vectors_TD"


def test_fisher_vectors_are_mean_squared_gradients():
    layer, unused = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
    rows = {t: torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i, t in enumerate("ab")}

    def loss(x):
        return layer(x).square().sum() / 2

    parameters = [*layer.parameters(), unused]
    found = fisher_vectors(parameters, rows, loss)
    for task, x in rows.items():
        out = layer(x).detach()
        weight = torch.stack([(o[:, None] * r[None]).square() for o, r in zip(out, x, strict=True)]).mean(0)
        expected = torch.cat([weight.flatten(), out.square().mean(0), torch.zeros(2)])
        assert torch.allclose(found[task], expected, atol=1e-6)
    assert all(p.grad is None for p in layer.parameters())
    halves = fisher_vectors(parameters, rows, loss, reduce=lambda vector_P: vector_P[:5] / 2)
    assert all(torch.equal(halves[t], v[:5] / 2) for t, v in found.items())
    with pytest.raises(ValueError, match="task 'c' has no batch"):
        fisher_vectors(list(layer.parameters()), {"c": []}, lambda x: x)


def test_a_sketch_is_a_signed_sum_a_cell_and_keeps_cosines():
    draw = torch.Generator().manual_seed(0)
    common = torch.rand(40_000, generator=draw)
    vectors = [common + share * torch.rand(40_000, generator=draw) for share in (0.1, 1.0, 10.0)]
    found = [sketch(v, 512, seed=3) for v in vectors]
    for i in range(3):
        assert abs(float(found[i].norm()) - 1) < 1e-6
        for j in range(i):
            kept = float(cosine_similarity(vectors[i], vectors[j], dim=0)) - float(found[i] @ found[j])
            assert abs(kept) < 3 / 512**0.5
    assert torch.equal(sketch(vectors[0], 512, seed=3), found[0])
    assert not torch.allclose(sketch(vectors[0], 512, seed=4), found[0], atol=1e-3)
    assert torch.allclose(sketch(7 * vectors[0], 512, seed=3), found[0], atol=1e-6), "its length says nothing"
    one_hot = [sketch(row, 8, seed=3) for row in torch.eye(20)]
    assert all(int((cell.abs() == 1).sum()) == 1 and int((cell != 0).sum()) == 1 for cell in one_hot)
    summed = normalize(sum(one_hot, torch.zeros(8)), dim=0)
    assert torch.allclose(sketch(torch.ones(20), 8, seed=3), summed, atol=1e-6)
    assert torch.equal(sketch(torch.zeros(20), 8, seed=3), torch.zeros(8))


def test_pca_keeps_what_varies_most():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([9, 4, 1, 1, 1, 1.0])
    vectors = {f"t{i}": torch.randn(6, generator=generator) * sizes for i in range(9)}
    found = torch.stack(list(pca(vectors, 3).values())).double()
    x = torch.stack(list(vectors.values())).double()
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)[:3]
    assert torch.allclose(torch.cov(found.T, correction=0), torch.diag(values), atol=1e-5)
    assert torch.allclose(found.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    flipped = {n: -v for n, v in vectors.items()}
    assert torch.allclose(torch.stack(list(pca(flipped, 3).values())).double(), -found, atol=1e-5)
    with pytest.raises(ValueError, match="dim: 7 components of 9 tasks with 6 numbers each"):
        pca(vectors, 7)


def write_task(root: Path, task: str, word: str) -> None:
    (root / task).mkdir(parents=True)
    for split, count in (("train", 12), ("validation", 3)):
        rows = [{"input": f"{word} w{i % 7}", "output": word if i % 2 else f"w{i % 5}"} for i in range(count)]
        (root / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BASES: dict[str, dict[str, Any]] = {
    "CAUSAL_LM": {"type": "llama", "num_key_value_heads": 2, **SHAPE},
    "SEQ_2_SEQ_LM": {"type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    "SEQ_CLS": {"type": "bert", "hidden_dropout_prob": 0.5, **SHAPE},
}


@pytest.fixture
def config(tmp_path) -> Config:
    for task, word in (("apple", "red"), ("berry", "blue")):
        write_task(tmp_path / "data", task, word)
    return Config(
        model=BASES["CAUSAL_LM"],
        tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=64),
        moe=TaskMoEConfig(r=2, num_experts=3, router="task_linear", router_scope="layer",
                          representation="fisher", representation_options={"rows": 5, "dim": 6}),
        data=DataConfig(root=str(tmp_path / "data"), max_length=16, cache_dir=str(tmp_path / "cache")),
        mixing=MixingConfig(strategy="equal"),
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=4,
        phases=(PhaseConfig(train=("base", "experts", "router")),),
        save_steps=2,
        save_total_limit=9,
        report_to=(),
    )  # fmt: skip


def read(config: Config) -> Data:
    return build_data(config, ALONE, ("train",), None, None, lambda line: None)


def as_defined(config: Config, data: Data, rows: int, dim: int, keep: str = "") -> dict[str, torch.Tensor]:
    """Row by row, by the base model alone and its own backward pass."""
    base: Any = build_model(config, data.tokenizer, data.bundle.tasks).eval()
    named = {n: p for n, p in base.named_parameters() if keep in n and not n.startswith("classifier")}
    found = {}
    for split in data.bundle.splits["train"]:
        total = {n: torch.zeros_like(p) for n, p in named.items()}
        for row in split.tokens.select(range(rows)):
            ids = torch.tensor([row["input_ids"]])
            base.zero_grad()
            if config.task_type == "SEQ_CLS":
                loss = cross_entropy(base(input_ids=ids).logits, torch.tensor([row["label"]]))
            else:
                labels = torch.tensor([row["labels"]])
                scored = labels[:, 1:] if config.task_type == "CAUSAL_LM" else labels
                loss = base(input_ids=ids, labels=labels).loss * int((scored != -100).sum())
            loss.backward()
            for n, p in named.items():
                total[n] += 0 if p.grad is None else p.grad.square()
        vector = torch.cat([(t / rows).flatten() for t in total.values()])
        found[data.bundle.tasks[split.task].name] = sketch(vector, dim, config.seed)
    return found


@pytest.mark.parametrize("task_type", BASES)
def test_rows_of_a_run_give_the_diagonal_of_the_base_alone(config, task_type):
    config = replace(config, task_type=task_type, model=BASES[task_type])
    if task_type == "SEQ_CLS":
        for path in Path(config.data.root).glob("*/*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows = [{"text": r["input"], "label": "even" if i % 2 else "odd"} for i, r in enumerate(rows)]
            path.write_text("\n".join(map(json.dumps, rows)))
    data = read(config)
    options = FisherVectors.Options(rows=5, dim=6)
    found = fisher_of_rows(config, data, ALONE, options, ["berry", "apple"])
    expected = as_defined(config, data, rows=5, dim=6)
    assert list(found) == ["berry", "apple"]
    for name, vector in found.items():
        assert torch.allclose(vector, expected[name], atol=1e-5), name
    assert not torch.allclose(found["apple"], found["berry"], atol=1e-3)


def test_a_pattern_chooses_parameters_by_the_names_of_the_base(config):
    data = read(config)
    options = FisherVectors.Options(parameters=r"model\.layers\.\d\.self_attn\.q_proj\.weight", rows=5, dim=6)
    found = fisher_of_rows(config, data, ALONE, options, ["apple"])
    expected = as_defined(config, data, rows=5, dim=6, keep="q_proj")
    assert torch.allclose(found["apple"], expected["apple"], atol=1e-5)
    with pytest.raises(
        ConfigError, match=r"moe.representation_options.parameters: 'q_proj' fits no parameter of"
    ):
        fisher_of_rows(config, data, ALONE, FisherVectors.Options(parameters="q_proj"), ["apple"])
    with pytest.raises(ConfigError, match="task_type: FEATURE_EXTRACTION compares rows of a batch; use text"):
        fisher_of_rows(replace(config, task_type="FEATURE_EXTRACTION"), data, ALONE, options, ["apple"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rows": 0}, "rows: 0; give a positive number"),
        ({"dim": -1}, "dim: -1; give a positive number"),
        ({"parameters": "("}, r"parameters: '\(' is no pattern"),
        ({"path": "x.json", "dim": 4}, "dim: 4 has no effect: path names vectors that are made already"),
    ],
)
def test_options_that_cannot_be_used(given, says):
    moe = TaskMoEConfig(router="task_linear", representation="fisher", representation_options=given)
    with pytest.raises(ConfigError, match=rf"moe.representation_options.{says}"):
        check_methods(moe)


def test_a_run_makes_them_keeps_them_and_gives_a_new_task_its_own(config, tmp_path):
    assert train(config) == 0
    run = tmp_path / "run"
    expected = as_defined(config, read(config), rows=5, dim=6)
    made = read_vectors(run / "task_vectors.safetensors")
    assert made.keys() == expected.keys()
    assert all(torch.allclose(made[n], v, atol=1e-5) for n, v in expected.items())
    saved = load_file(run / "checkpoint-4" / "adapter_model.safetensors")
    assert torch.equal(saved[NAME], torch.stack([made["apple"], made["berry"]]))
    options = options_of("representation", config.moe, FisherVectors)
    assert (options.rows, options.dim, options.normalise) == (5, 6, True)

    write_task(tmp_path / "data", "citrus", "green")
    assert train(replace(config, max_steps=6, resume_from_checkpoint="true")) == 0
    grown = load_file(run / "checkpoint-6" / "adapter_model.safetensors")[NAME]
    assert torch.equal(grown[:2], saved[NAME]) and grown.shape == (3, 6)
    assert torch.equal(grown[2], read_vectors(run / "task_vectors.safetensors")["citrus"])
    assert not torch.allclose(grown[2], saved[NAME].mean(0), atol=1e-3), "not the mean of the others"
