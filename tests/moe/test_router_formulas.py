"""Routers that read the task's vector, against torch's own layers: logits and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taskmoe.moe import TaskMoEConfig
from taskmoe.moe.routers.kinds import ROUTERS
from taskmoe.moe.tasks import TaskTable

GROUPS, TASKS, HEADS, EXPERTS, DIM = 3, 5, 2, 4, 6
VECTORS = torch.randn(TASKS, DIM, generator=torch.Generator().manual_seed(0))


def stirred(name, **options):
    """A router in float64 whose every tensor is of ordinary size."""
    config = TaskMoEConfig(
        num_experts=EXPERTS, num_heads=HEADS, router_hidden_dim=8, router=name, router_options=options
    )
    tasks = TaskTable.from_names([f"task-{i}" for i in range(TASKS)])
    router = ROUTERS[name](config, [f"layers.{i}" for i in range(GROUPS)], tasks, DIM).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in router.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return router


def test_the_linear_router_by_hand():
    router, vectors = stirred("task_linear"), VECTORS.double()
    found = router(torch.tensor([2]), vectors[2:3]).detach()
    for s in range(GROUPS):
        expected = (vectors[2] @ router.w_SDE[s] + router.b_SE[s]).detach()
        assert torch.allclose(found[s, 0].flatten(), expected)


def test_the_shared_mlp_is_one_mlp_whose_outputs_are_all_groups_logits():
    router, vectors = stirred("shared_mlp"), VECTORS.double()
    plain = nn.Sequential(nn.Linear(DIM, 8), nn.GELU(), nn.Linear(8, GROUPS * HEADS * EXPERTS)).double()
    with torch.no_grad():
        plain[0].weight.copy_(router.w1_DF.T)
        plain[0].bias.copy_(router.b1_F)
        plain[2].weight.copy_(router.w2_FE.T)
        plain[2].bias.copy_(router.b2_E)
    expected = plain(vectors[[4, 1]]).view(2, GROUPS, HEADS, EXPERTS)
    assert torch.allclose(router(torch.tensor([4, 1]), vectors[[4, 1]]), expected.transpose(0, 1))


def transposed(t):
    return t.T if t.dim() == 2 else t


def same_gradients(router, mine, plain, theirs, pairs):
    """Back-propagate one weighing of both; ``pairs``: (my parameter, how theirs looks to me)."""
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.allclose(mine, theirs, rtol=1e-12)
    (mine * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert {id(p) for p, _ in pairs} == {id(p) for p in router.parameters()}
    for p, of_theirs in pairs:
        assert torch.allclose(p.grad, of_theirs(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_recurrent_router_is_torchs_own(cell, bidirectional):
    router = stirred("recurrent", cell=cell, bidirectional=bidirectional)
    plain = getattr(nn, cell.upper())(DIM, 8, bidirectional=bidirectional).double()
    ways = ["", "_reverse"][: 1 + bidirectional]
    names = {"weight_ih_l0": "w_in_CDQ", "weight_hh_l0": "w_hidden_CFQ",
             "bias_ih_l0": "b_in_CQ", "bias_hh_l0": "b_hidden_CQ"}  # fmt: skip
    with torch.no_grad():
        for theirs, mine in names.items():
            for c, way in enumerate(ways):
                getattr(plain, theirs + way).copy_(transposed(getattr(router, mine)[c]))
    places, w_out, b_out = (
        p.detach().clone().requires_grad_() for p in (router.places_SD, router.w_out_FE, router.b_out_E)
    )
    tasks, vectors = torch.tensor([4, 1]), VECTORS.double()[[4, 1]]
    hidden, _ = plain(vectors + places[:, None])
    theirs = (hidden @ w_out + b_out).view(GROUPS, 2, HEADS, EXPERTS)

    def stacked(name):
        return lambda: torch.stack([transposed(getattr(plain, name + way).grad) for way in ways])

    pairs = [(getattr(router, mine), stacked(name)) for name, mine in names.items()]
    pairs += [(router.places_SD, lambda: places.grad), (router.w_out_FE, lambda: w_out.grad)]
    same_gradients(
        router, router(tasks, vectors), plain, theirs, [*pairs, (router.b_out_E, lambda: b_out.grad)]
    )


@pytest.mark.parametrize("heads", [1, 4])
def test_the_transformer_router_is_torchs_own(heads):
    router = stirred("transformer", heads=heads)
    plain = nn.TransformerEncoderLayer(8, heads, 32, dropout=0.0, batch_first=True).double()
    names = {
        "self_attn.in_proj_weight": "w_qkv_FQ", "self_attn.out_proj.weight": "w_mix_FF",
        "self_attn.out_proj.bias": "b_mix_F", "linear1.weight": "w_up_FU", "linear1.bias": "b_up_U",
        "linear2.weight": "w_down_UF", "linear2.bias": "b_down_F",
    }  # fmt: skip
    with torch.no_grad():
        plain.self_attn.in_proj_bias.zero_()
        for theirs, mine in names.items():
            plain.get_parameter(theirs).copy_(transposed(getattr(router, mine)))
        for norm, mine in ((plain.norm1, router.norm1_2F), (plain.norm2, router.norm2_2F)):
            norm.weight.copy_(mine[0])
            norm.bias.copy_(mine[1])
    outside = ("w_in_DF", "b_in_F", "places_SF", "w_out_FE", "b_out_E")
    own = {n: getattr(router, n).detach().clone().requires_grad_() for n in outside}
    tasks, vectors = torch.tensor([4, 1]), VECTORS.double()[[4, 1]]
    x_TSF = (vectors @ own["w_in_DF"] + own["b_in_F"])[:, None] + own["places_SF"]
    theirs = (plain(x_TSF) @ own["w_out_FE"] + own["b_out_E"]).transpose(0, 1)
    pairs = [
        (getattr(router, m), lambda t=t: transposed(plain.get_parameter(t).grad)) for t, m in names.items()
    ]
    pairs += [(getattr(router, n), lambda n=n: own[n].grad) for n in outside]
    for norm, mine in ((plain.norm1, router.norm1_2F), (plain.norm2, router.norm2_2F)):
        pairs.append((mine, lambda norm=norm: torch.stack([norm.weight.grad, norm.bias.grad])))
    theirs = theirs.reshape(GROUPS, 2, HEADS, EXPERTS)
    same_gradients(router, router(tasks, vectors), plain, theirs, pairs)
