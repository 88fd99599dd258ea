from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset

from taskmoe.moe import TaskMoEConfig, TaskTable, attach, attach_heads
from taskmoe.moe.config import ConfigError
from taskmoe.train.config import Config, DataConfig, DatasetConfig, EvaluationConfig, TokenizerConfig
from taskmoe.train.data.bundle import TaskSplit
from taskmoe.train.data.collator import Collator
from taskmoe.train.data.encode import encode_prompts, encode_targets
from taskmoe.train.distributed import Ranks
from taskmoe.train.evaluate import evaluate, primary_metrics
from taskmoe.train.models import build_model, build_tokenizer
from taskmoe.train.objectives import IGNORE

SIZE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "CAUSAL_LM": {"type": "llama", **SIZE},
    "SEQ_2_SEQ_LM": {
        "type": "t5",
        "d_model": 16,
        "d_ff": 16,
        "d_kv": 8,
        "num_layers": 1,
        "num_heads": 2,
        "initializer_factor": 4.0,
    },
    "SEQ_CLS": {"type": "bert", **SIZE},
}
LETTERS = "abcdefgh"
LABELS = {"two": ("no", "yes it is"), "three": ("b", "aa", "c")}
Setup = tuple[Any, list[TaskSplit], Any, Config, Collator]


def alone() -> Ranks:
    return Ranks(0, 1, 0, torch.device("cpu"))


def split_of(config: Config, tokenizer: Any, tasks: TaskTable, task: int, n_rows: int) -> TaskSplit:
    """Rows of random letters; the target is a label, or the prompt reversed."""
    rng = random.Random(task)
    raw, tokens = [], []
    for row in range(n_rows):
        prompt = "".join(rng.choices(LETTERS, k=rng.randint(2, 9)))
        target = rng.choice(tasks[task].labels[:3]) if tasks[task].labels else prompt[::-1]
        raw.append({"prompt": prompt, "target": target, "accepted": [target]})
        (inputs,) = encode_prompts(tokenizer, [prompt], config.task_type)
        (answer,) = encode_targets(tokenizer, [target], config.task_type)
        columns = {"input_ids": inputs, "row": row, "length": len(inputs)}
        if config.task_type == "CAUSAL_LM":
            columns |= {"input_ids": inputs + answer, "labels": [IGNORE] * len(inputs) + answer}
            columns |= {"prompt_length": len(inputs), "length": len(inputs + answer)}
        elif config.task_type == "SEQ_2_SEQ_LM":
            columns["labels"] = answer
        else:
            columns["label"] = tasks[task].labels.index(target)
        tokens.append(columns)
    return TaskSplit(task, Dataset.from_list(tokens) if tokens else Dataset.from_dict({"length": []}), raw)


def setup(
    task_type: str, n_rows: int = 7, labels: dict[str, tuple[str, ...]] = LABELS, **changes: Any
) -> Setup:
    """A tiny model with experts that differ (B is not 0), two tasks with labels and, for LMs, two without."""
    config = Config(
        model=MODELS[task_type],
        task_type=task_type,
        tokenizer=TokenizerConfig("char"),
        data=DataConfig(max_length=32),
        per_device_eval_batch_size=4,
        moe=TaskMoEConfig(r=2, num_experts=2, lora_dropout=0.1),
        evaluation=EvaluationConfig(max_new_tokens=5),
    )
    config = dataclasses.replace(config, **changes)
    tokenizer = build_tokenizer(config, [LETTERS, "yes it is no"])
    tasks = TaskTable()
    for name, of_task in labels.items():
        tasks.add(name, of_task)
    if task_type != "SEQ_CLS":
        tasks.add("free")
        tasks.add("other")
    base = build_model(config, tokenizer, tasks)
    if task_type == "SEQ_CLS":
        base = attach_heads(base, tasks)
    model = attach(base, config.moe, tasks)
    torch.manual_seed(1)
    for kind in ("experts", "router", "heads"):
        for _, parameter in model.parameter_groups()[kind]:
            torch.nn.init.normal_(parameter, std=0.5)
    splits = [split_of(config, tokenizer, tasks, t, n_rows) for t in range(len(tasks))]
    counts = [len(t.labels or ()) for t in tasks]
    return model, splits, tokenizer, config, Collator(tokenizer, task_type, len(tasks), counts)


def run(parts: Setup, **kwargs: Any) -> dict[str, Any]:
    model, splits, tokenizer, config, collator = parts
    return evaluate(model, splits, tokenizer, config, collator, alone(), return_predictions=True, **kwargs)


def answer_loss(model: Any, task_type: str, task: int, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Summed loss of one answer, one sequence at a time and with the model's own loss."""
    labels = [IGNORE] * len(prompt) + answer if task_type == "CAUSAL_LM" else answer
    inputs = prompt + answer if task_type == "CAUSAL_LM" else prompt
    out = model(input_ids=torch.tensor([inputs]), labels=torch.tensor([labels]), task_ids=[task])
    return out.loss * len(answer)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@torch.no_grad()
def test_labels_are_scored_by_likelihood_as_one_at_a_time(task_type: str) -> None:
    parts = setup(task_type)
    model, splits, tokenizer, *_ = parts
    found = run(parts)
    model.eval()
    seen = set()
    for task, (name, labels) in enumerate(LABELS.items()):
        answers = encode_targets(tokenizer, labels, task_type)
        total, tokens = torch.zeros(()), 0
        for row, raw in enumerate(splits[task].raw):
            (prompt,) = encode_prompts(tokenizer, [raw["prompt"]], task_type)
            losses = [answer_loss(model, task_type, task, prompt, a) for a in answers]
            means = torch.stack([x / len(a) for x, a in zip(losses, answers, strict=True)])
            assert found["predictions"][name][row] == labels[int(means.argmin())]
            gold = labels.index(raw["target"])
            total, tokens = total + losses[gold], tokens + len(answers[gold])
        assert found["tasks"][name]["loss"] == pytest.approx((total / tokens).item(), rel=1e-5)
        seen |= set(found["predictions"][name])
    assert len(seen) > 2  # not the same label everywhere


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_is_as_one_at_a_time(task_type: str, num_beams: int) -> None:
    parts = setup(task_type, evaluation=EvaluationConfig(max_new_tokens=5, num_beams=num_beams))
    model, splits, tokenizer, *_ = parts
    found = run(parts)
    model.eval()
    for task, name in ((2, "free"), (3, "other")):
        for row, raw in enumerate(splits[task].raw):
            (prompt,) = encode_prompts(tokenizer, [raw["prompt"]], task_type)
            ids = torch.tensor([prompt])
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), task_ids=[task],
                                 max_new_tokens=5, num_beams=num_beams, do_sample=False)  # fmt: skip
            answer = out[0, len(prompt) :] if task_type == "CAUSAL_LM" else out[0]
            assert found["predictions"][name][row] == tokenizer.decode(answer, skip_special_tokens=True)
    assert len(set(found["predictions"]["free"] + found["predictions"]["other"])) > 2


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@torch.no_grad()
def test_loss_of_free_text_is_the_mean_over_target_tokens(task_type: str) -> None:
    parts = setup(task_type)
    model, splits, tokenizer, *_ = parts
    found = run(parts, tasks=[2])
    assert list(found["tasks"]) == ["free"]
    model.eval()
    total, tokens = torch.zeros(()), 0
    for raw in splits[2].raw:
        (prompt,) = encode_prompts(tokenizer, [raw["prompt"]], task_type)
        (answer,) = encode_targets(tokenizer, [raw["target"]], task_type)
        total, tokens = total + answer_loss(model, task_type, 2, prompt, answer), tokens + len(answer)
    assert found["tasks"]["free"]["loss"] == pytest.approx((total / tokens).item(), rel=1e-5)


@torch.no_grad()
def test_an_encoder_predicts_its_largest_logit() -> None:
    parts = setup("SEQ_CLS")
    model, splits, *_ = parts
    found = run(parts)
    model.eval()
    for task, (name, labels) in enumerate(LABELS.items()):
        losses = []
        for row, columns in enumerate(splits[task].tokens):
            ids = torch.tensor([columns["input_ids"]])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), task_ids=[task]).logits[0]
            assert found["predictions"][name][row] == labels[int(logits[: len(labels)].argmax())]
            losses.append(-logits.log_softmax(-1)[columns["label"]].item())
        assert found["tasks"][name]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        hits = [
            p == raw["target"] for p, raw in zip(found["predictions"][name], splits[task].raw, strict=True)
        ]
        assert found["tasks"][name]["accuracy"] == pytest.approx(sum(hits) / len(hits))


def _on_a_rank(task_type: str) -> dict[str, Any]:
    import torch.distributed as dist

    parts = setup(task_type, n_rows=9)  # an odd number of batches
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    calls = []
    parts[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model, splits, tokenizer, config, collator = parts
    found = evaluate(model, splits, tokenizer, config, collator, ranks, return_predictions=True)
    return found | {"calls": len(calls)}


def test_two_ranks_give_the_numbers_of_one(spawn_ranks: Callable[..., list[Any]]) -> None:
    for task_type in ("CAUSAL_LM", "SEQ_CLS"):
        one, two = spawn_ranks(_on_a_rank, task_type=task_type)
        assert (
            one["calls"] == two["calls"]
        )  # a rank short of a batch repeats one: ZeRO-3 would hang otherwise
        assert one == two
        one.pop("calls")
        assert one == run(setup(task_type, n_rows=9))  # bit for bit


def test_training_does_not_notice() -> None:
    parts = setup("CAUSAL_LM")
    model = parts[0]
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout))
    frozen.eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state(), random.getstate()
    run(parts)
    assert [m.training for m in model.modules()] == modes and not frozen.training
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert all(p.grad is None for p in model.parameters())


def test_between_forward_and_backward() -> None:
    parts = setup("CAUSAL_LM")
    model = parts[0]
    gradients = []
    for between in (False, True):
        model.eval()
        model.zero_grad()
        ids = torch.tensor([[5, 6, 7], [7, 6, 5]])
        loss = model(input_ids=ids, labels=ids, task_ids=[0, 2]).loss
        if between:
            run(parts)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_collators_packing_is_not_used() -> None:
    parts = setup("CAUSAL_LM")
    model, splits, tokenizer, config, _ = parts
    packing = Collator(tokenizer, "CAUSAL_LM", len(model.tasks), packing=True, max_length=64)
    assert run((model, splits, tokenizer, config, packing)) == run(parts)


def test_max_rows_are_spread_over_the_split() -> None:
    parts = setup("SEQ_CLS", n_rows=9)
    whole = run(parts)
    model, splits, tokenizer, config, collator = parts
    config = dataclasses.replace(config, evaluation=EvaluationConfig(max_rows=3))
    found = run((model, splits, tokenizer, config, collator))
    assert found["tasks"]["two"]["rows"] == 3
    assert found["predictions"]["two"] == [whole["predictions"]["two"][i] for i in (0, 3, 6)]


def test_score_averages_groups_first() -> None:
    groups = EvaluationConfig(
        max_new_tokens=2, groups={"labelled": "t*"}, metrics={"three": "macro_recall", "t*": "macro_f1"}
    )
    found = run(setup("CAUSAL_LM", evaluation=groups))
    tasks = found["tasks"]
    assert [tasks[n]["metric"] for n in tasks] == ["macro_f1", "macro_recall", "exact_match", "exact_match"]
    group = (tasks["two"]["macro_f1"] + tasks["three"]["macro_recall"]) / 2
    assert found["groups"] == pytest.approx(
        {"labelled": group, "free": tasks["free"]["exact_match"], "other": tasks["other"]["exact_match"]}
    )
    assert found["score"] == pytest.approx(sum(found["groups"].values()) / 3)
    assert found["macro"]["accuracy"] == pytest.approx(
        (tasks["two"]["accuracy"] + tasks["three"]["accuracy"]) / 2
    )
    assert found["macro"]["loss"] == pytest.approx(sum(t["loss"] for t in tasks.values()) / 4)


def test_tasks_without_rows_are_left_out() -> None:
    model, splits, tokenizer, config, collator = setup("CAUSAL_LM", n_rows=2)
    empty = [splits[0], *(split_of(config, tokenizer, model.tasks, t, 0) for t in (1, 2, 3))]
    found = run((model, empty, tokenizer, config, collator))
    assert list(found["tasks"]) == ["two"]
    with pytest.raises(ConfigError, match="none of the tasks has rows"):
        run((model, empty[1:], tokenizer, config, collator))


def test_a_label_that_does_not_fit_pushes_the_prompt_out() -> None:
    gpt2 = {"type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 22}
    long = "a b c d e f g h i"
    labels = LABELS | {"three": ("b", "aa", "c", long)}
    parts = setup("CAUSAL_LM", labels=labels, model=gpt2, data=DataConfig(max_length=22))
    assert max(parts[1][1].tokens["prompt_length"]) + len(long) + 1 > 22
    found = run(parts)  # learned positions: one too many would be an index error
    assert found["tasks"]["two"]["rows"] == 7 and len(found["predictions"]["free"]) == 7


def test_prompts_leave_fewer_positions_to_new_tokens() -> None:
    gpt2 = {"type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 26}
    moe = TaskMoEConfig(bank="prompt", bank_options={"length": 4})
    parts = setup("CAUSAL_LM", moe=moe, model=gpt2, data=DataConfig(max_length=22),
                  evaluation=EvaluationConfig(max_new_tokens=30))  # fmt: skip
    found = run(parts)  # learned positions: one too many would be an index error
    assert len(found["predictions"]["free"]) == 7


def table() -> TaskTable:
    tasks = TaskTable()
    tasks.add("irony", ["not", "irony"])
    tasks.add("stance_a", ["none", "favor", "against"])
    tasks.add("sum")
    return tasks


def test_metric_of_the_data_set_then_first_pattern_then_default() -> None:
    config = Config(
        datasets=(DatasetConfig(name="irony", path="x", metric="f1:irony"),),
        evaluation=EvaluationConfig(
            metrics={"stance_*": "f1:favor,against", "s*": "rouge_l", "irony": "accuracy"}
        ),
    )
    assert primary_metrics(config, table()) == ["f1:irony", "f1:favor,against", "rouge_l"]
    assert primary_metrics(Config(), table()) == ["accuracy", "accuracy", "exact_match"]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (EvaluationConfig(metrics={"stanze_*": "accuracy"}), r"evaluation.metrics: 'stanze_\*' matches none"),
        (EvaluationConfig(groups={"stance": "x*"}), r"evaluation.groups: 'x\*' matches none"),
        (EvaluationConfig(metrics={"irony": "f1:ironic"}), r"task 'irony': .*irony"),
        (EvaluationConfig(metrics={"sum": "macro_f1"}), r"task 'sum': .*needs a task with a set of labels"),
        (EvaluationConfig(metrics={"sum": "exakt_match"}), r"task 'sum': .*exact_match"),
    ],
)
def test_settings_that_cannot_be_used(evaluation: EvaluationConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        primary_metrics(Config(evaluation=evaluation), table())
