"""Routing by token: every router under every gate and bank against loops over rows; and its surgery.

Legend: B sequences, M rows, K d_in, E experts, D vectors of tasks or instances.
"""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskmoe.moe import ConfigError, TaskMoEConfig, TaskMoEModel, attach, siblings
from taskmoe.moe.context import RowSpaceError, use
from taskmoe.moe.growth import grow
from taskmoe.moe.layer import MoELinear
from taskmoe.moe.tasks import TaskError, TaskTable
from taskmoe.moe.token_routers.arrow import set_prototypes
from taskmoe.moe.token_routers.clusters import TokenClusterRouter, set_centroids
from taskmoe.moe.token_routers.kinds import TOKEN_ROUTERS
from taskmoe.train.task_gradients import TaskGradients

TASKS = ["a", "b", "c"]
BATCH = [2, 0, 1, 0]
D = 5  # of the instances' embeddings
ROUTERS = {
    "token_linear": {},
    "token_task_sum": {"task_embedding_dim": 6},
    "token_task_concat": {"task_embedding_dim": 6, "router_hidden_dim": 7},
    "gate_per_task": {},
    "token_cluster": {"gate": "raw", "router_options": {"dim": D, "speed": 2.0}, "router_temperature": 0.7},
    "ranks": {"gate": "raw", "router_options": {"top_k": 2}},
    "arrow": {"gate": "top_k", "top_k": 2, "router_temperature": 0.5},
}
METHODS: dict[str, dict] = {name: {"router": name, **settings} for name, settings in ROUTERS.items()}
for gate, more in {"top_k": {"top_k": 2}, "one_hot": {}, "sigmoid": {}}.items():
    METHODS[f"token_linear, {gate}"] = {"router": "token_linear", "gate": gate, **more}
METHODS["token_linear, more above"] = {
    **METHODS["token_linear, top_k"], "expert_pattern": {r"layers\.0\..*": 2, "v_proj": 3},
}  # fmt: skip
METHODS["token_task_sum, top_k"] = {**METHODS["token_task_sum"], "gate": "top_k", "top_k": 2}
for bank, more in {"shared_a": {}, "mix_and_match": {"num_experts": 6}, "mtl_lora": {}}.items():
    for name in ("token_linear", "token_linear, top_k", "gate_per_task"):
        METHODS[f"{bank}, {name}"] = {**METHODS[name], "bank": bank, **more}
METHODS["mix_and_match, token_cluster"] = {
    **METHODS["token_cluster"], "bank": "mix_and_match", "num_experts": 6,
}  # fmt: skip
METHODS["own_keys"] = {"bank": "own_keys", "r": 6, "bank_options": {"top_k": 3, "temperature": 0.3}}
for bank, more in {"shared_a": {}, "mix_and_match": {"num_experts": 6}, "mtl_lora": {}}.items():
    METHODS[f"{bank}, by task"] = {"bank": bank, "router_init_std": 0.5, **more}
    METHODS[f"{bank}, by task, top_k"] = {**METHODS[f"{bank}, by task"], "gate": "top_k", "top_k": 2}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(autouse=True)
def siblings_share_small_batches_too(monkeypatch):
    monkeypatch.setattr(siblings, "SMALL", 0)


def config_of(method: str) -> TaskMoEConfig:
    settings = METHODS[method]
    if "bank" not in settings or settings["bank"] != "own_keys":
        settings = {"num_experts": 4, "r": 2, **settings}
    return TaskMoEConfig.from_dict({"lora_alpha": 3.0, **settings})


@pytest.fixture
def build(tiny, shaken):
    """method -> a model in fp64 whose tensors, buffers too, have ordinary size."""

    def make(method, kind="llama"):
        model = shaken(attach(tiny(kind), config_of(method), TASKS, dry_run=False)).double()
        generator = torch.Generator().manual_seed(8)
        for module in model.modules():
            if isinstance(module, TokenClusterRouter):
                module.centroids_ED.copy_(torch.randn(module.centroids_ED.shape, generator=generator))
            if hasattr(module, "bias_E"):
                module.bias_E.copy_(torch.randn(module.bias_E.shape, generator=generator) * 0.3)
        if model.moe_config.router == "arrow":
            set_prototypes(model)
        return model.eval()

    return make


@pytest.fixture
def inputs(batch):
    """method, tasks -> a batch, with embeddings of its instances where the router reads them."""

    def make(method, tasks=BATCH, kind="llama", **more):
        found = batch(kind, tasks, **more)
        if METHODS[method].get("router") == "token_cluster":
            generator = torch.Generator().manual_seed(5)
            embeddings = torch.randn(len(tasks), D, generator=generator, dtype=torch.float64)
            found["instance_embeddings"] = embeddings
        return found

    return make


# -- the formulas, row by row --------------------------------------------------------------------------------


def logits_of(layer: MoELinear, model: TaskMoEModel, x: Tensor, task: int, instance: Tensor | None) -> Tensor:
    """What the router of a layer says of one row."""
    router, config = layer.token_routing.router, model.moe_config
    name = config.router
    if name == "token_linear":
        return router.weight_E1K[:, 0] @ x
    if name == "token_task_sum":
        return router.weight_E1K[:, 0] @ x + model.routing.representation.embedding_TD[task] @ router.up_DE
    if name == "token_task_concat":
        both = torch.cat([x, model.routing.representation.embedding_TD[task]])
        first = torch.cat([router.token_F1K[:, 0], router.task_DF.T], dim=1)
        return router.weight_E1F[:, 0] @ nn.functional.gelu(first @ both + router.b1_F) + router.b2_E
    if name == "gate_per_task":
        return router.weight_TEK[task] @ x
    if name == "token_cluster":
        w, out = 1 / (1 + torch.exp(-2 * router.omega_1)), 1 / (1 + torch.exp(-2 * router.beta_1))
        scores = torch.exp(router.weight_E1K[:, 0] @ x / 0.7)
        clusters = torch.stack([c @ instance for c in router.centroids_ED])
        return out * (w * len(scores) * scores / scores.sum() + (1 - w) * 4 * clusters)
    if name == "ranks":
        p = 1 / (1 + torch.exp(-router.weight_E1K[:, 0] @ x))
        kept = torch.zeros_like(p)
        for e in (p + router.bias_E).argsort(descending=True)[:2]:
            kept[e] = 1
        return 2 * p * kept / (p * kept).sum()
    assert name == "arrow"
    logits = []
    for A, B in zip(layer.bank.A_ErK, layer.bank.B_ErN, strict=True):
        logits.append(torch.linalg.svd(B.T.detach() @ A.detach()).Vh[0] @ x)
    return torch.stack(logits).abs()


def gates_of(logits: Tensor, config: TaskMoEConfig) -> Tensor:
    logits = logits / (1 if config.gate == "raw" else config.router_temperature)
    if config.gate == "raw":
        return logits
    if config.gate == "softmax":
        return logits.exp() / logits.exp().sum()
    if config.gate == "sigmoid":
        odds = 1 / (1 + (-logits).exp())
        return odds / (odds.sum() + 1e-12)
    if config.gate == "top_k":
        kept = logits >= logits.sort(descending=True).values[config.top_k - 1]
        return torch.where(kept, logits.exp(), 0.0) / logits[kept].exp().sum()
    assert config.gate == "one_hot"
    soft = logits.exp() / logits.exp().sum()
    return soft + ((logits == logits.max()).to(soft.dtype) - soft).detach()


def update_of(layer: Any, config: TaskMoEConfig, x: Tensor, task: int, g: Tensor | None) -> Tensor:
    """What the experts of a layer add to one row."""
    bank = layer.bank
    if config.bank == "low_rank":
        pairs = zip(g, bank.A_ErK, bank.B_ErN, strict=True)
        total, rank = sum(g_e * (B.T @ (A @ x)) for g_e, A, B in pairs), config.r
    elif config.bank == "shared_a":
        total = sum(g_e * (B.T @ (bank.A_RK @ x)) for g_e, B in zip(g, bank.B_ErN, strict=True))
        rank = config.r
    elif config.bank == "mtl_lora":
        middle = bank.lambda_Trr[task] @ (bank.A_RK @ x)
        total, rank = sum(g_e * (B.T @ middle) for g_e, B in zip(g, bank.B_ErN, strict=True)), config.r
    elif config.bank == "mix_and_match":
        total, rank = torch.zeros_like(bank.B_QN[0]), config.r
        for i, a in enumerate(bank.A_RK):
            for j, b in enumerate(bank.B_QN):
                total = total + g[i * len(bank.B_QN) + j] * b * (a @ x)
    else:
        s = bank.A_RK @ x
        n = s / s.square().sum().sqrt()
        kept = n >= n.sort(descending=True).values[2]
        w = torch.where(kept, torch.exp(n / 0.3), 0.0)
        total, rank = bank.B_RN.T @ (w / w.sum() * s), config.r
    return 3.0 / rank * total


def gates_at(
    layer: MoELinear, model: TaskMoEModel, x: Tensor, task: int, instance: Tensor | None
) -> Tensor | None:
    """The gates of one row of a layer; None where its bank takes none."""
    config = model.moe_config
    if layer.token_routing is not None:
        return gates_of(logits_of(layer, model, x, task, instance), config)
    if config.bank == "own_keys":
        return None
    return gates_of(model.routing.router.logits_STHE[layer.group, task, 0], config)


class Dense(nn.Module):
    """A frozen linear and the experts of one layer, one row at a time."""

    def __init__(self, layer: MoELinear, model: TaskMoEModel, tasks: list[int], instances: Tensor | None):
        super().__init__()
        self.found = [layer, model]
        self.tasks, self.instances = tasks, instances

    def forward(self, x: Tensor) -> Tensor:
        layer, model = self.found
        config = model.moe_config
        rows = []
        for b, x_LK in enumerate(x):
            for x_K in x_LK:
                task, instance = self.tasks[b], None if self.instances is None else self.instances[b]
                g = gates_at(layer, model, x_K, task, instance)
                y = layer.base.weight @ x_K + (0 if layer.bias is None else layer.bias)
                rows.append(y + update_of(layer, config, x_K, task, g))
        return torch.stack(rows).view(*x.shape[:-1], -1)


def densely(model: TaskMoEModel, batch: dict) -> Tensor:
    """The logits of ``model`` with every layer as a loop; gradients reach the same parameters."""
    tasks, instances = batch["task_ids"].tolist(), batch.get("instance_embeddings")
    layers = [(n, m) for n, m in model.base_model.named_modules() if isinstance(m, MoELinear)]
    assert layers
    for name, layer in layers:
        _set(model.base_model, name, Dense(layer, model, tasks, instances))
    try:
        kept = {n: v for n, v in batch.items() if n not in ("task_ids", "instance_embeddings")}
        return model.base_model(**kept).logits
    finally:
        for name, layer in layers:
            _set(model.base_model, name, layer)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def test_forward_and_gradients_are_those_of_loops_over_rows(method, build, inputs, gradients, close):
    model, batch = build(method), inputs(method, length=4)
    expected = densely(model, batch)
    weights = torch.randn_like(expected)
    wanted = gradients(model, (expected * weights).sum())
    found = model(**batch).logits
    close(found, expected, 1e-12)
    close(gradients(model, (found * weights).sum()), wanted, 1e-12)
    assert all(g.any() for n, g in wanted.items() if "embedding" not in n), "nothing compared"


def test_every_token_router_is_compared():
    compared = {settings.get("router") for settings in METHODS.values()}
    assert compared >= TOKEN_ROUTERS.keys() - {"random_instances"}  # draws; see its own test


# -- what every method must hold -----------------------------------------------------------------------------


def test_a_mixed_batch_is_its_sequences_one_at_a_time(method, build, inputs, gradients, close):
    model, batch = build(method), inputs(method)
    together = model(**batch).logits
    weights = torch.randn_like(together)
    whole = gradients(model, (together * weights).sum())
    for i in range(len(BATCH)):
        alone = model(**{n: v[i : i + 1] for n, v in batch.items()}).logits
        close(alone, together[i : i + 1], 1e-12)
        (alone * weights[i : i + 1]).sum().backward()
    close(gradients(model), whole, 1e-12)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing(method, mode, build, inputs, gradients, close, checkpoint):
    model, batch = build(method).train(), {**inputs(method), "use_cache": False}
    plain = model(**batch).logits
    expected = gradients(model, plain.square().sum())
    out = checkpoint(model, mode)(**batch).logits
    close(out, plain, 1e-12)
    close(gradients(model, out.square().sum()), expected, 1e-12)


def test_a_saved_adapter_comes_back_with_its_buffers(method, build, inputs, tiny, tmp_path):
    model = build(method).float()
    model.save_pretrained(tmp_path)
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path, dry_run=False).eval()
    batch = inputs(method)
    if "instance_embeddings" in batch:
        batch["instance_embeddings"] = batch["instance_embeddings"].float()
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_one_backward_pass_keeps_the_tasks_gradients_apart(method, build, inputs, close):
    model, batch = build(method), inputs(method)
    gradients = TaskGradients(model)
    assert gradients.way == "fused"
    with gradients:
        model(**batch).logits.square().sum().backward()
    gradients.matrix.reduce()
    gradients._route()
    fused = {n: gradients.matrix.block(n).clone() for n in gradients.scope.shared}
    rows = dict(gradients.rows)
    model.zero_grad()
    separate = TaskGradients(model, way="separate")
    losses = model(**batch).logits.square().sum((1, 2))
    by_task = {t: losses[batch["task_ids"] == t].sum() for t in set(BATCH)}
    separate.backward(by_task)
    separate.matrix.reduce()
    assert fused
    for name, block in fused.items():
        order = [rows[t] for t in separate.rows]
        close(block[order].flatten(1), separate.matrix.block(name).flatten(1), 1e-10)


def test_beams_belong_to_their_sequence(method, build, inputs):
    model, batch = build(method), inputs(method, [2, 0], length=5)
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    together = model.generate(**batch, **settings)
    for i in range(2):
        alone = model.generate(**{n: v[i : i + 1] for n, v in batch.items()}, **settings)
        length = min(alone.shape[1], together.shape[1])
        assert torch.equal(alone[0, :length], together[i, :length])


def test_uniform_gates_forget_the_router(method, build, inputs, close):
    model, batch = build(method), inputs(method)
    with model.uniform_gates(), torch.no_grad():
        found = model(**batch).logits
        for name, p in model.named_parameters():
            if "token_routing" in name or name.startswith("routing."):
                p.add_(1.0)
        close(model(**batch).logits, found, 1e-12)
        for layer in (m for m in model.modules() if isinstance(m, MoELinear)):
            router = getattr(layer.token_routing, "router", None)
            E, total = model.moe_config.num_experts, getattr(router, "total", 1.0)
            if model.moe_config.expert_pattern:
                E = len(layer.bank.A_ErK)
            if model.moe_config.bank == "own_keys":
                E = model.moe_config.r
            x, y = torch.randn(1, 1, layer.base.in_features).double(), torch.zeros(1)
            gate = torch.full((E,), total / E, dtype=torch.float64)
            if model.moe_config.bank == "own_keys":
                y = 3.0 / E * (layer.bank.B_RN.T @ (layer.bank.A_RK @ x[0, 0] / E))
            else:
                y = update_of(layer, model.moe_config, x[0, 0], 1, gate)
            with use(model.context([1])):
                close(layer(x)[0, 0] - layer.base(x)[0, 0], y, 1e-10)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert"])
@pytest.mark.parametrize("name", ["token_linear, top_k", "token_task_sum", "token_cluster", "own_keys"])
def test_other_architectures_take_it(name, kind, build, inputs, head, close):
    model, batch = build(name, kind), inputs(name, kind=kind)
    together = head(model(**batch))
    for i in range(len(BATCH)):
        close(head(model(**{n: v[i : i + 1] for n, v in batch.items()})), together[i : i + 1], 1e-12)


def test_packed_rows_are_their_parts(build, close):
    """Positions of several tasks in one row, against each task's positions in a row of their own."""
    model = build("token_task_sum")
    ids = torch.randint(4, 61, (1, 8), generator=torch.Generator().manual_seed(2))
    tasks = torch.tensor([[0, 0, 0, 2, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    mask = torch.block_diag(torch.ones(3, 3), torch.ones(5, 5)).tril().bool()[None, None]
    packed = model(input_ids=ids, task_ids=tasks, position_ids=positions, attention_mask=mask).logits
    for start, end, task in ((0, 3, 0), (3, 8, 2)):
        alone = model(input_ids=ids[:, start:end], task_ids=torch.tensor([task])).logits
        close(packed[:, start:end], alone, 1e-10)


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_a_base_in_bf16_rounds_the_output_alone(method, how, build, inputs, gradients):
    """Gates come from the rows in fp32: with rows that bf16 can hold no choice turns."""
    model, batch = build(method).float(), inputs(method)
    instances = batch.get("instance_embeddings")
    if instances is not None:
        batch["instance_embeddings"] = instances = instances.float()
    if how == "bf16":
        for _, p in model.parameter_groups()["base"]:
            p.data = p.data.to(torch.bfloat16)
    layer = next(m for m in model.modules() if isinstance(m, MoELinear))
    x_MK = torch.randn(6, layer.base.in_features).to(torch.bfloat16).float()
    context = model.context([1])
    context.instances = None if instances is None else instances[:1]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
    with use(context), autocast, torch.no_grad():
        given = x_MK.to(torch.bfloat16) if how == "bf16" else x_MK
        found = layer(given[None])[0]
        assert found.dtype == torch.bfloat16
    weight_NK, config = layer.base.weight.float(), model.moe_config
    sizes = SimpleNamespace(bank=copy.deepcopy(layer.bank))  # what would be added up if nothing cancelled
    with torch.no_grad():
        for p in sizes.bank.parameters():
            p.abs_()
        for x_K, y_N in zip(x_MK, found, strict=True):
            g = gates_at(layer, model, x_K, 1, context.instances[0] if instances is not None else None)
            expected = weight_NK @ x_K + update_of(layer, config, x_K, 1, g)
            size = update_of(sizes, config, x_K.abs(), 1, None if g is None else g.abs())
            bound = 2**-7 * float((weight_NK.abs() @ x_K.abs() + size).max())
            assert float((y_N - expected).abs().max()) <= bound
    with autocast:
        loss = model(**batch).logits.float().square().mean()
    for name, gradient in gradients(model, loss).items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name


def test_a_library_takes_its_buffers_along_and_does_not_renumber_pairs(build, inputs, tiny, tmp_path):
    model, batch = build("token_cluster").float(), inputs("token_cluster")
    batch["instance_embeddings"] = batch["instance_embeddings"].float()
    model.save_pretrained(tmp_path / "clusters")
    table = TaskTable.from_names([*TASKS, "d"])
    grown = grow(tiny("llama"), tmp_path / "clusters", 4, table, dry_run=False).eval()
    assert torch.equal(grown(**batch).logits, model(**batch).logits)
    with pytest.raises(ConfigError, match=r"moe\.router: 'token_cluster' would send tokens of the old tasks"):
        grow(tiny("llama"), tmp_path / "clusters", 5, table, dry_run=False)
    build("mix_and_match, by task").float().save_pretrained(tmp_path / "pairs")
    with pytest.raises(ConfigError, match=r"moe\.bank: 'mix_and_match' weighs all experts"):
        grow(tiny("llama"), tmp_path / "pairs", 8, dry_run=False)


# -- the vectors of tasks ------------------------------------------------------------------------------------


def test_one_vector_a_task_serves_all_layers(build):
    model = build("token_task_sum")
    groups = model.parameter_groups()
    assert [n for n, _ in groups["task_embedding"]] == ["routing.representation.embedding_TD"]
    assert all("token_routing" in n for n, _ in groups["router"])


def test_the_hidden_layer_alone_lets_the_task_change_what_a_token_says(build):
    """Sum: logits of two tasks differ by one vector whatever the token. Concatenation: they do not."""
    for name, constant in (("token_task_sum", True), ("token_task_concat", False), ("gate_per_task", False)):
        model = build(name)
        layer = next(m for m in model.modules() if isinstance(m, MoELinear))
        x = torch.randn(4, layer.base.in_features).double()
        logits = []
        for task in (0, 1):
            context = model.context([task])
            with use(context):
                logits.append(layer.token_routing.router(x, context, context.plan([4], "x")))
        difference = logits[0] - logits[1]
        assert torch.allclose(difference, difference[:1].expand_as(difference), atol=1e-10) == constant


# -- MoR1E ---------------------------------------------------------------------------------------------------


def test_centroids_must_fit(build):
    model = build("token_cluster")
    for wrong in (torch.zeros(4, D + 1), torch.zeros(3, D)):
        with pytest.raises(ConfigError, match=r"moe\.num_experts and moe\.router_options\.dim"):
            set_centroids(model, wrong)
    with pytest.raises(ConfigError, match="takes no centroids"):
        set_centroids(build("token_linear"), torch.zeros(4, D))
    set_centroids(model, torch.ones(4, D))
    routers = [m for m in model.modules() if isinstance(m, TokenClusterRouter)]
    assert all(bool((r.centroids_ED == 1).all()) for r in routers)
    for one, other in pairwise(routers):
        assert one.centroids_ED.data_ptr() != other.centroids_ED.data_ptr()


def test_instances_must_be_given(build, inputs):
    model, batch = build("token_cluster"), inputs("token_cluster")
    for wrong in (None, batch["instance_embeddings"][:2], batch["instance_embeddings"][:, :3]):
        with pytest.raises(TaskError, match=r"instance_embeddings: .*moe.router_options.dim"):
            model(**{**batch, "instance_embeddings": wrong})
    packed = {"input_ids": batch["input_ids"], "task_ids": torch.zeros_like(batch["input_ids"])}
    with pytest.raises(RowSpaceError, match="packing"):
        model(**packed, instance_embeddings=batch["instance_embeddings"])


def test_the_mixing_scalars_are_named_and_start_at_one_half(tiny):
    model = attach(tiny("llama"), config_of("token_cluster"), TASKS, dry_run=False)
    scalars = {n.rpartition(".")[2]: p for n, p in model.named_parameters() if "omega" in n or "beta" in n}
    assert set(scalars) == {"omega_1", "beta_1"}
    assert all(torch.equal(p, torch.zeros(1)) for p in scalars.values())


# -- SMoRA ---------------------------------------------------------------------------------------------------


def test_the_bias_follows_the_choices_of_a_whole_step(build, inputs):
    model, batch = build("ranks").train(), inputs("ranks")
    router = next(m.token_routing.router for m in model.modules() if isinstance(m, MoELinear))
    before = router.bias_E.clone()
    model(**batch)
    model(**batch)  # a second micro-batch
    count = router.count_E.clone()
    assert count.sum() == 2 * 2 * batch["input_ids"].numel()
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)
    assert torch.equal(router.count_E, count), "evaluation does not count"
    others = torch.tensor([1000.0, 0.0, 0.0, 0.0])  # of another rank
    model.after_step(lambda t: t + others)
    both = count + others
    assert torch.equal(router.bias_E, before + 1e-5 * torch.sign(both.mean() - both))
    assert not router.count_E.any()
    model.after_step(lambda t: t)
    assert torch.equal(router.bias_E, before + 1e-5 * torch.sign(both.mean() - both)), "no rows, no change"


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_padding_is_not_counted(kind, build, inputs):
    """As far as it is known: the mask is the encoder's, though the decoder has as many positions here."""
    model, batch = build("ranks", kind).train(), inputs("ranks", kind=kind)
    batch["attention_mask"][0, 4:] = 0
    batch["attention_mask"][2, 7:] = 0
    if kind == "t5":
        batch["decoder_input_ids"] = batch["input_ids"].clone()
    model(**batch)
    for layer in (m for m in model.modules() if isinstance(m, MoELinear)):
        # In a decoder the mask is not known, not even where keys and values of the encoder's rows are made.
        counted = batch["input_ids"].numel() if "decoder" in layer.name else batch["attention_mask"].sum()
        assert layer.token_routing.router.count_E.sum() == 2 * counted, layer.name


def test_the_bias_stands_still_while_the_router_is_frozen(build, inputs):
    model = build("ranks").train()
    before = [m.bias_E.clone() for m in model.modules() if hasattr(m, "bias_E")]
    for groups, moves in ((["experts"], False), (["experts", "router"], True)):
        model.set_trainable(groups)
        model(**inputs("ranks"))
        model.after_step(lambda t: t)
        after = [m.bias_E for m in model.modules() if hasattr(m, "bias_E")]
        assert moves != all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_the_bias_is_the_same_under_checkpointing(mode, build, inputs, checkpoint):
    found = []
    for how in ("none", mode):
        model = checkpoint(build("ranks"), how)
        model(**inputs("ranks"), use_cache=False).logits.sum().backward()
        model.after_step(lambda t: t)
        found.append([m.bias_E for m in model.modules() if hasattr(m, "bias_E")])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_bias_chooses_and_does_not_gate(build, inputs):
    model = build("ranks")
    layer = next(m for m in model.modules() if isinstance(m, MoELinear))
    router, context = layer.token_routing.router, model.context([0])
    x = torch.randn(6, layer.base.in_features).double()
    router.bias_E.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    gates = router(x, context, context.plan([6], "x"))
    p = torch.sigmoid(x @ router.weight_E1K[:, 0].T)[:, :2]
    assert torch.allclose(gates[:, :2], 2 * p / p.sum(1, keepdim=True))
    assert not gates[:, 2:].any()


# -- what cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"router": "token_cluster"}, "moe.gate: 'softmax' with router 'token_cluster'"),
        ({"router": "ranks", "gate": "softmax"}, "moe.gate: 'softmax' with router 'ranks'"),
        ({"router": "ranks", "gate": "raw", "router_options": {"top_k": 9}}, "moe.router_options.top_k: 9"),
        ({"router": "ranks", "gate": "raw", "router_options": {"bias_step": -1.0}}, "options.bias_step"),
        ({"router": "token_linear", "compose": "before"}, "moe.compose: 'before'"),
        ({"bank": "mix_and_match", "r": 3, "num_experts": 8}, "moe.num_experts: 8 pairs of 3 rows"),
        ({"bank": "own_keys", "r": 4}, "moe.bank_options.top_k: 8 must be between 1 and r = 4"),
        ({"bank": "own_keys", "r": 8, "bank_options": {"temperature": 0.0}}, "moe.bank_options.temperature"),
        ({"router": "token_linear", "router_options": {"top_k": 2}}, "moe.router_options.top_k"),
        ({"expert_pattern": {"q_proj": 2}}, "moe.expert_pattern: router 'task_table' gives all layers as"),
        (
            {"router": "token_linear", "gate": "top_k", "top_k": 3, "expert_pattern": {"q_proj": 2}},
            "moe.expert_pattern: 2 experts of 'q_proj' are fewer than top_k 3",
        ),
        ({"router": "token_linear", "expert_pattern": {"q_proj": 0}}, "moe.expert_pattern['q_proj']: 0"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, key, tiny):
    with pytest.raises(ConfigError, match=re.escape(key)):
        attach(tiny("llama"), TaskMoEConfig.from_dict(settings), TASKS, dry_run=False)
