"""Where prompts go and start, what is refused, and what is kept of them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM, ViTConfig, ViTModel

from taskmoe.moe import ConfigError, TaskMoEConfig, TaskMoEModel, attach
from taskmoe.moe.attach import check
from taskmoe.moe.banks.prompt.vectors import average_vectors, task_vector

TASKS = ["sort", "sum", "translate"]


def config(bank, **options):
    return TaskMoEConfig.from_dict({"bank": bank, "bank_options": {"length": 3, **options}})


def test_prompts_start_as_embeddings_of_tokens_the_same_for_all_tasks(tiny):
    base = tiny("llama")
    weight = base.get_input_embeddings().weight.detach().clone()
    for bank in ("prompt", "multitask_prompt"):
        model = attach(copy.deepcopy(base), config(bank), TASKS)
        prompts = model.prompts.bank(model.context([0, 1, 2]))
        assert torch.equal(prompts[0], prompts[1]) and torch.equal(prompts[0], prompts[2])
        for position in prompts[0]:
            assert (position == weight).all(1).any()
    experts = attach(copy.deepcopy(base), config("prompt_bank"), TASKS).prompts.bank.prompts_ElW
    assert len({tuple(p.flatten().tolist()) for p in experts}) == 8


@pytest.mark.parametrize("bank", ["prompt", "multitask_prompt", "prompt_bank"])
def test_step_0_is_the_base_with_those_tokens_before_the_text(bank, tiny, batch, head, close):
    """The start is not the base alone: tokens stand before the text."""
    base = tiny("gpt2").eval()
    inputs = batch("gpt2", [1, 0, 1, 2])
    model = attach(copy.deepcopy(base), config(bank), TASKS).eval()
    with torch.no_grad():
        prompt = model.prompts.bank(model.context([0]))  # of one router row; the rows differ by 1e-3
    embedded = base.get_input_embeddings()(inputs["input_ids"])
    both = torch.cat([prompt.expand(4, -1, -1), embedded], dim=1)
    bound = 1e-3 if bank == "prompt_bank" else 1e-6
    close(head(model(**inputs)), base(inputs_embeds=both).logits[:, 3:], bound)


def test_a_deviation_starts_prompts_at_random(tiny):
    for where, width in (("input", 16), ("layers", 2 * 2 * 2 * 4)):
        model = attach(tiny("llama"), config("prompt", where=where, start_std=0.5, length=40), TASKS)
        prompts = model.prompts.bank.prompts_TlW
        assert prompts.shape == (3, 40, width)
        assert 0.45 < prompts[0].std() < 0.55
    model = attach(tiny("llama"), config("prompt", where="layers", length=40), TASKS)
    assert 0.018 < model.prompts.bank.prompts_TlW[0].std() < 0.022
    apart = attach(tiny("llama"), config("multitask_prompt", factor_std=0.5, length=40), TASKS).prompts.bank
    assert 0.4 < apart.rows_Tl.std() < 0.6 and 0.4 < apart.columns_TW.std() < 0.6
    assert abs(apart.rows_Tl.mean() - 1) < 0.2


def test_prompts_alone_train(tiny):
    for bank, names in (
        ("prompt", {"prompts_TlW"}),
        ("multitask_prompt", {"shared_lW", "rows_Tl", "columns_TW"}),
    ):
        model = attach(tiny("t5"), config(bank), TASKS)
        assert {n.removeprefix("prompts.bank.") for n in model.trainable_names()} == names
        assert {n for n, _ in model.parameter_groups()["experts"]} == set(model.trainable_names())
    model = attach(tiny("t5"), config("prompt_bank"), TASKS)
    assert set(model.trainable_names()) == {"prompts.bank.prompts_ElW", "routing.router.logits_STHE"}


@pytest.mark.parametrize("where", ["input", "layers"])
def test_everything_trains_and_prompts_part(where, bank, prompted, tiny, batch, head, adapters):
    model = prompted("llama", bank, where=where).train()
    before = {n: p.detach().clone() for n, p in adapters(model).items()}
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=1e-2)
    for step in range(3):
        inputs = batch("llama", [0, 1, 2, 0, 1, 2], seed=step)
        logits = head(model(**inputs))[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, p in adapters(model).items():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
        optimizer.step()
    for name, p in adapters(model).items():
        assert not torch.equal(p, before[name]), name


def test_equal_starts_part_by_what_their_tasks_need(tiny, batch, head, adapters):
    for name in ("prompt", "multitask_prompt"):
        model = attach(tiny("llama"), config(name), TASKS)
        optimizer = torch.optim.AdamW(adapters(model).values(), lr=1e-2)
        for step in range(3):
            inputs = batch("llama", [0, 1, 2, 0, 1, 2], seed=step)
            logits, targets = head(model(**inputs))[:, :-1], inputs["input_ids"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        prompts = model.prompts.bank(model.context([0, 1, 2]))
        assert not torch.equal(prompts[0], prompts[1]) and not torch.equal(prompts[1], prompts[2])


def test_absent_tasks_get_zeros(prompted, batch, head, gradients):
    model = prompted("llama", "prompt")
    found = gradients(model, head(model(**batch("llama", [0, 2]))).square().sum())
    rows = found["prompts.bank.prompts_TlW"].flatten(1).abs().amax(1)
    assert rows[0] > 0 and rows[2] > 0 and rows[1] == 0


@pytest.mark.parametrize("where", ["input", "layers"])
def test_a_saved_adapter_comes_back_bit_for_bit(where, bank, prompted, tiny, batch, head, tmp_path):
    model = prompted("llama", bank, where=where).float()
    model.save_pretrained(tmp_path)
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert again.moe_config == model.moe_config
    inputs = batch("llama", [2, 0, 1, 0])
    assert torch.equal(head(again(**inputs)), head(model(**inputs)))


@pytest.fixture
def learned(tiny, shaken, tmp_path):
    """A model whose prompts have moved, as it was saved in the folder."""
    model = shaken(attach(tiny("llama"), config("prompt"), TASKS))
    model.save_pretrained(tmp_path / "learned")
    return model.prompts.bank, tmp_path / "learned"


def test_the_prompt_from_which_all_started_is_saved_with_them(tiny, learned):
    bank, folder = learned
    start = attach(tiny("llama"), config("prompt"), TASKS).prompts.bank
    assert torch.equal(start.prompts_TlW[1], start.start_lW) and torch.equal(bank.start_lW, start.start_lW)
    torch.manual_seed(5)  # another start, if it were not read
    again = TaskMoEModel.from_pretrained(tiny("llama"), folder).prompts.bank
    assert torch.equal(again.start_lW, start.start_lW)


@pytest.mark.parametrize(
    ("options", "rows", "scale"),
    [({}, [0, 1, 2], 1.0), ({"vectors_of": ["sum"]}, [1], 1.0), ({"vectors_scale": 0.25}, [0, 1, 2], 0.25)],
)
def test_prompts_start_from_the_vectors_of_earlier_tasks(
    options, rows, scale, tiny, learned, tmp_path, close
):
    bank, folder = learned
    model = attach(tiny("llama"), config("prompt", vectors_from=str(folder), **options), ["x", "y"])
    start = bank.start_lW + scale * sum(bank.prompts_TlW[t] - bank.start_lW for t in rows)
    assert torch.equal(model.prompts.bank.prompts_TlW[0], model.prompts.bank.prompts_TlW[1])
    close(model.prompts.bank.prompts_TlW[0], start)
    assert torch.equal(model.prompts.bank.start_lW, model.prompts.bank.prompts_TlW[0])
    model.save_pretrained(tmp_path / "new")
    (folder / "adapter_model.safetensors").unlink()
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "new")
    assert torch.equal(again.prompts.bank.prompts_TlW, model.prompts.bank.prompts_TlW)


def test_starts_that_cannot_be(tiny, learned, tmp_path):
    _, folder = learned
    attach(tiny("llama"), config("multitask_prompt"), TASKS).save_pretrained(tmp_path / "shared")
    given = str(folder)
    for options, message in (
        ({"vectors_from": str(tmp_path)}, "vectors_from: .* holds no adapter_model.safetensors"),
        ({"vectors_from": str(tmp_path / "shared")}, "vectors_from: .* is no adapter of bank: prompt"),
        ({"vectors_from": given, "vectors_of": ["sing"]}, "vectors_from: .* has no prompt for sing"),
        (
            {"vectors_from": given, "length": 5},
            r"vectors_from: its prompts are \(3, 16\), this model's \(5, 16\)",
        ),
        ({"vectors_from": given, "start_std": 0.1}, "start_std: 0.1 beside vectors_from"),
        ({"vectors_from": given, "vectors_of": []}, "vectors_of: is empty"),
        ({"vectors_of": ["sum"]}, r"vectors_of: \('sum',\) has no effect without vectors_from"),
        ({"vectors_scale": 0.5}, "vectors_scale: 0.5 has no effect without vectors_from"),
    ):
        with pytest.raises(ConfigError, match=f"moe.bank_options.{message}"):
            attach(tiny("llama"), config("prompt", **options), TASKS)


def test_a_new_task_starts_from_the_mean_of_what_the_others_learned(tiny, shaken, tmp_path, close):
    start = attach(tiny("llama"), config("prompt"), TASKS).prompts.bank.prompts_TlW.detach().clone()
    model = shaken(attach(tiny("llama"), config("prompt"), TASKS))
    tuned = model.prompts.bank.prompts_TlW
    model.save_pretrained(tmp_path)
    table = copy.deepcopy(model.tasks)
    table.add("new")
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path, table).prompts.bank.prompts_TlW
    assert torch.equal(again[:3], tuned)
    vectors = [task_vector(tuned[t], start[t]) for t in range(3)]
    close(again[3], average_vectors(start[0], vectors))


def test_frozen_vectors_of_tasks_retrieve_prompts_for_new_ones_too(tiny, shaken, tmp_path, close):
    vectors = {"sort": [1.0, 0.0, 2.0], "sum": [0.0, 1.0, -1.0], "translate": [0.5, 0.5, 0.0]}
    path = tmp_path / "vectors.json"
    path.write_text(json.dumps({**vectors, "sorting": vectors["sort"]}))
    settings = {"bank": "prompt_bank", "bank_options": {"length": 3}, "num_experts": 4, "gate": "top_k",
                "top_k": 2, "router": "task_linear", "representation": "frozen",
                "representation_options": {"path": str(path)}}  # fmt: skip
    model = shaken(attach(tiny("llama"), TaskMoEConfig.from_dict(settings), TASKS)).double()
    router, bank_ElW = model.routing.router, model.prompts.bank.prompts_ElW
    with torch.no_grad():
        found = model.prompts.bank(model.context([0, 1, 2]))
        for task, name in enumerate(TASKS):
            key = torch.tensor(vectors[name], dtype=torch.float64)
            scores = [float(key @ router.w_SDE[0, :, e] + router.b_SE[0, e]) for e in range(4)]
            best = sorted(range(4), key=lambda e: -scores[e])[:2]
            weights = torch.tensor([scores[e] for e in best], dtype=torch.float64).softmax(0)
            close(found[task], weights[0] * bank_ElW[best[0]] + weights[1] * bank_ElW[best[1]], 1e-12)
    model.float().save_pretrained(tmp_path / "saved")
    table = copy.deepcopy(model.tasks)
    table.add("sorting")
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "saved", table)
    with torch.no_grad():
        prompts = again.prompts.bank(again.context([0, 3]))
    assert torch.equal(prompts[1], prompts[0])


def test_the_same_seed_gives_the_same_start(tiny):
    found = []
    for _ in range(2):
        base = tiny("llama")
        torch.manual_seed(5)
        found.append(attach(base, config("prompt_bank"), TASKS).prompts.bank.prompts_ElW)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bank_options": {"where": "inputs"}}, r"moe.bank_options.where: 'inputs' is unknown; known are"),
        ({"bank_options": {"length": 0}}, r"moe.bank_options.length: 0 must be at least 1"),
        ({"bank_options": {"length": 64}}, r"moe.bank_options.length: 64 leaves no position of 64"),
        ({"bank_options": {"start_std": -1.0}}, r"moe.bank_options.start_std: -1.0 must be 0 or more"),
        ({"bank_options": {"lengths": 3}}, r"moe.bank_options.lengths: unknown option"),
        (
            {"bank": "prompt_bank", "router_scope": "model"},
            r"moe.router_scope: 'model' with prompts; a bank of prompts has one routing",
        ),
        (
            {"bank": "prompt_bank", "num_heads": 2, "compose": "before"},
            r"moe.num_heads: 2 with prompts; they are mixed whole",
        ),
        (
            {"bank": "multitask_prompt", "bank_options": {"factor_std": -0.1}},
            r"moe.bank_options.factor_std: -0.1 must be 0 or more",
        ),
    ],
)
def test_options_that_cannot_be_used(settings, message, tiny):
    with pytest.raises(ConfigError, match=message):
        attach(tiny("gpt2"), TaskMoEConfig.from_dict({"bank": "prompt", **settings}), TASKS)


def test_options_are_read_before_there_is_a_model():
    with pytest.raises(ConfigError, match=r"moe.bank_options.length: 0 must be at least 1"):
        check(config("prompt_bank", length=0))


def test_models_that_prompts_cannot_enter(tiny):
    small = {"hidden_size": 16, "num_hidden_layers": 2}
    mamba = MambaForCausalLM(MambaConfig(vocab_size=61, state_size=4, **small))
    with pytest.raises(ConfigError, match="MambaModel has a cache of its own kind"):
        attach(mamba, config("prompt"), TASKS)
    heads = {"num_attention_heads": 4, "intermediate_size": 24}
    with pytest.raises(ConfigError, match="no part of ViTModel takes input_ids"):
        attach(ViTModel(ViTConfig(image_size=32, **small, **heads)), config("prompt"), TASKS)
    with pytest.raises(ConfigError, match="'layers' does not work on T5Stack: encoder-decoder models"):
        attach(tiny("t5"), config("prompt", where="layers"), TASKS)
    mistral = MistralForCausalLM(
        MistralConfig(vocab_size=61, num_key_value_heads=2, sliding_window=4, **small, **heads)
    )
    with pytest.raises(ConfigError, match=r"'layers' does not work on MistralModel: .*sliding"):
        attach(mistral, config("prompt", where="layers"), TASKS)


def test_a_model_gets_prompts_once(tiny):
    base = tiny("llama")
    attach(base, config("prompt"), TASKS)
    with pytest.raises(ConfigError, match="carries prompts already"):
        attach(base, config("prompt"), TASKS)


def test_a_copy_has_prompts_of_its_own(prompted, batch, head):
    model, inputs = prompted("llama", "prompt"), batch("llama", [0, 1])
    expected = head(model(**inputs))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.prompts.bank.prompts_TlW.zero_()
    assert torch.equal(head(model(**inputs)), expected)
    assert (head(other(**inputs)) - expected).abs().max() > 1e-6
