from __future__ import annotations

import pytest
import torch

from taskmoe.kernels import grouped_linear as module
from taskmoe.kernels.grouped_linear import GroupedMM, grouped_linear, grouped_mm_takes
from taskmoe.kernels.plan import Plan

ROWS = [2, 2, 2, 0, 0, 3, 2, 2]  # task 1 has none, task 2 has two segments
E, K, N = 5, 8, 16


def operands(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((len(ROWS), K), (E, N, K), (E, N))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("experts", [[0, 1, 2, 3], [3, 3, 1, 3], [4, 0, 4, 4]])
@pytest.mark.parametrize("with_bias", [True, False])
def test_each_row_meets_the_expert_of_its_task(experts, with_bias) -> None:
    plan, (x, weight, bias) = Plan.from_rows(ROWS, 4), operands()
    leaves = [x, weight, bias] if with_bias else [x, weight]
    out = grouped_linear(x, weight, bias if with_bias else None, experts, plan)
    of_row = torch.tensor(experts)[plan.row_tasks()]
    truth = torch.einsum("mk,mnk->mn", x, weight[of_row]) + (bias[of_row] if with_bias else 0)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(o.sin().sum(), leaves) for o in (out, truth))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    unused = sorted(set(range(E)) - set(of_row.tolist()))
    assert found[1][unused].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_is_the_loop(monkeypatch, dtype) -> None:
    """torch's grouped_mm runs on the CPU too: the way that a GPU takes, with an expert without rows."""
    plan = Plan.from_rows([0, 0, 0, 1, 1, 3, 3, 3], 4)
    x, weight, bias = operands(dtype)
    loop = grouped_linear(x, weight, bias, [1, 2, 3, 4], plan)
    wanted = torch.autograd.grad(loop.float().sum(), [x, weight, bias])
    calls: list[int] = []
    monkeypatch.setattr(module, "grouped_mm_takes", lambda *_: calls.append(1) or True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    grouped = grouped_linear(x, weight, bias, [1, 2, 3, 4], plan)
    found = torch.autograd.grad(grouped.float().sum(), [x, weight, bias])  # a gradient of stride 0
    assert calls
    bound = 4 * torch.finfo(dtype).eps
    for one, other in zip([grouped, *found], [loop, *wanted], strict=True):
        assert (one - other).abs().max() <= bound * other.abs().max()
    assert found[1][0].count_nonzero() == found[1][3].count_nonzero() == 0


def test_rows_that_are_not_sorted_by_expert_are_looped_over(monkeypatch) -> None:
    plan, (x, weight, bias) = Plan.from_rows(ROWS, 4), operands(torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(GroupedMM, "apply", lambda *_: pytest.fail("not sorted"))
    grouped_linear(x, weight, bias, [3, 2, 1, 0], plan)


def test_what_grouped_mm_takes() -> None:
    x, weight, _ = operands(torch.bfloat16)
    assert grouped_mm_takes(x, weight)
    assert not grouped_mm_takes(x.float(), weight.float())
    assert not grouped_mm_takes(x, weight[:, :, :4].contiguous())  # 8 bytes a row
    assert not grouped_mm_takes(x.t().contiguous().t(), weight)


def test_no_rows() -> None:
    _, weight, bias = operands()
    plan = Plan.from_rows([], 4)
    assert grouped_linear(torch.ones(0, K, dtype=torch.float64), weight, bias, [0] * 4, plan).shape == (0, N)


def test_what_does_not_fit_is_named() -> None:
    plan, (x, weight, bias) = Plan.from_rows(ROWS, 4), operands()
    with pytest.raises(ValueError, match=r"x is \(8, 7\); the plan and the weight ask for \(8, 8\)"):
        grouped_linear(x[:, :7], weight, bias, [0] * 4, plan)
    with pytest.raises(ValueError, match=r"bias is \(5, 15\); the weight asks for \(5, 16\)"):
        grouped_linear(x, weight, bias[:, :15], [0] * 4, plan)
    for experts in ([0] * 3, [0, 0, 0, 5], [0, 0, 0, -1]):
        with pytest.raises(ValueError, match=r"experts are .*give one of 0\.\.4 for each of 4 tasks"):
            grouped_linear(x, weight, bias, experts, plan)
