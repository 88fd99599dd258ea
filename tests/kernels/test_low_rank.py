from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from taskmoe.kernels import little, reference
from taskmoe.kernels import low_rank as low_rank_module
from taskmoe.kernels.low_rank import average, low_rank, low_rank_averaged
from taskmoe.kernels.plan import Plan


def detached(case) -> list[object]:
    return [t.detach() if torch.is_tensor(t) else t for t in case.args()]


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("G", [1, 4])
def test_gradcheck(make_case, k, G) -> None:
    case = make_case(task_of_row=[1, 1, 0, 1], k=k, experts=3, K=3, N=2)

    def op(x, y, A, B, gates):
        return low_rank(x, y, A.expand(G, *A.shape), B.expand(G, *B.shape), gates, case.slots, 0.5, case.plan)

    assert torch.autograd.gradcheck(op, tuple(case.leaves().values()))


@pytest.mark.parametrize("k", [None, 2])
def test_both_ops_are_well_behaved(make_case, k) -> None:
    case = make_case(k=k, G=4, with_y=k is None)
    *operands, plan = detached(case)
    torch.library.opcheck(torch.ops.taskmoe.low_rank_fwd.default, (*operands, plan.op_tables()))
    x, _, *banks = operands
    s = torch.randn(plan.rows, case.gates.shape[1] * 2, dtype=x.dtype)
    dy = torch.randn(plan.rows, 9, dtype=x.dtype)
    for needs in ([True] * 4, [False, True, False, True]):
        args = (dy, x, s, *banks, plan.op_tables(), needs)
        torch.library.opcheck(torch.ops.taskmoe.low_rank_bwd.default, args)


@pytest.mark.slow
@pytest.mark.parametrize("k", [None, 2])
def test_one_graph_under_compile(make_case, k) -> None:
    case = make_case(k=k, dtype=torch.float32, G=4)

    def step(x, y, A, B, gates):
        A, B = A.expand(4, *A.shape), B.expand(4, *B.shape)
        return low_rank(2 * x, y, A, B, gates, case.slots, 0.5, case.plan).tanh()

    leaves = list(case.leaves().values())
    results = []
    for function in (torch.compile(step, fullgraph=True), step):
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("k", [None, 2])
def test_under_activation_checkpointing(make_case, run_op, reentrant, k) -> None:
    case = make_case(k=k, G=4)

    def checkpointed(*args):
        return checkpoint(low_rank, *args, use_reentrant=reentrant)

    plain, found = run_op(low_rank, case), {}
    out = checkpointed(*case.args())
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    found = {name: leaf.grad for name, leaf in case.leaves().items()}
    assert torch.equal(out, plain["out"])
    for name, grad in found.items():
        assert torch.equal(grad, plain[name]), name


def test_a_frozen_operand_gets_no_gradient(make_case) -> None:
    case = make_case()
    case.A.requires_grad_(False)
    case.y.requires_grad_(False)
    low_rank(*case.args()).sum().backward()
    assert case.A.grad is None and case.y.grad is None
    assert all(t.grad is not None for t in (case.x, case.B, case.gates))


def test_a_hook_on_the_expanded_bank_sees_every_task(make_case) -> None:
    case = make_case(G=4)
    args, seen = list(case.args()), []
    args[2].register_hook(seen.append)
    low_rank(*args).sum().backward()
    assert [tuple(s.shape) for s in seen] == [(4, 5, 2, 7)]
    torch.testing.assert_close(seen[0].sum(0), case.A.grad)


@pytest.mark.parametrize("G", [1, 4])
def test_autocast_leaves_the_sums_alone(make_case, run_op, monkeypatch, G) -> None:
    monkeypatch.setattr(little, "_cheapest", lambda *_: None)  # the ops either way: bits are compared
    case = make_case(dtype=torch.float32, G=G)
    plain = run_op(low_rank, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run_op(low_rank, case)
    for name, value in plain.items():
        assert torch.equal(cast[name], value), name


def test_rows_take_the_dtype_of_y(make_case) -> None:
    case = make_case(dtype=torch.float32)
    x, y, *rest = case.args()
    out = low_rank(x, y.bfloat16(), *rest)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert case.x.grad.dtype == case.y.grad.dtype == torch.float32
    assert torch.equal(out, low_rank(x.bfloat16(), y.bfloat16(), *rest))


def test_the_environment_picks_the_implementation(make_case, monkeypatch) -> None:
    case = make_case(dtype=torch.float32, K=300)
    monkeypatch.setattr(reference, "low_rank", lambda *args: "the reference")
    monkeypatch.setenv("TASKMOE_KERNELS", "reference")
    assert low_rank(*case.args()) == "the reference"
    monkeypatch.setenv("TASKMOE_KERNELS", "auto")
    assert torch.is_tensor(low_rank(*case.args()))
    monkeypatch.setenv("TASKMOE_KERNELS", "fast")
    with pytest.raises(ValueError, match="TASKMOE_KERNELS is 'fast'; use one of auto, triton, reference"):
        low_rank(*case.args())


def test_importing_twice_registers_once() -> None:
    code = (
        "import sys, importlib, gc, torch\n"
        "import taskmoe.kernels.low_rank as first\n"
        "importlib.reload(first)\n"
        "del sys.modules['taskmoe.kernels.low_rank'], first\n"
        "import taskmoe.kernels.low_rank as second\n"
        "gc.collect()\n"
        "from taskmoe.kernels.plan import Plan\n"
        "o = second.low_rank(torch.ones(2, 3), None, torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 2),"
        " torch.ones(1, 1), None, 1.0, Plan.from_rows([0, 0], 1))\n"
        "assert o.tolist() == [[3.0, 3.0]] * 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("with_y", [True, False])
def test_a_frozen_weight_is_accumulated_onto_the_experts(make_case, k, with_y) -> None:
    case = make_case(k=k, with_y=with_y)
    weight = torch.randn(9, 7, dtype=torch.float64)
    leaves = list(case.leaves().values())
    out = low_rank(*case.args(), weight)
    truth = reference.low_rank(*case.args()) + case.x @ weight.t()
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(o.sin().sum(), leaves) for o in (out, truth))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_weight_that_trains_or_does_not_fit_is_refused(make_case) -> None:
    case, weight = make_case(), torch.randn(9, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match="weight trains, and would get no gradient"):
        low_rank(*case.args(), weight.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"weight is \(9, 7\) torch.float32; x and the result ask for"):
        low_rank(*case.args(), weight.float())
    with pytest.raises(ValueError, match=r"weight is \(7, 9\)"):
        low_rank_module.add_linear_(torch.zeros(15, 9, dtype=torch.float64), case.x, weight.t())


@pytest.mark.parametrize("H", [1, 2, 3])
def test_average_is_the_reference(H) -> None:
    g = torch.Generator().manual_seed(0)
    bank = torch.randn(5, 2, 12, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, H, 5, generator=g, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (average, reference.average):
        out = function(bank, weights)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [bank, weights])])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_one_averaged_expert_a_task(make_case) -> None:
    case = make_case()
    A, B = (bank[:4].detach().requires_grad_() for bank in (case.A, case.B))
    out = low_rank_averaged(case.x, case.y, A, B, 0.5, case.plan)
    rows = case.plan.row_tasks()
    truth = case.y + 0.5 * torch.einsum("mk,mrk,mrn->mn", case.x, A[rows], B[rows])
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(o.sin().sum(), [A, B, case.x]) for o in (out, truth))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.ones(15, 8)}, r"x is \(15, 8\); the plan and A ask for \(15, 7\)"),
        ({0: torch.ones(14, 7)}, r"x is \(14, 7\)"),
        ({1: torch.ones(15, 8)}, r"y is \(15, 8\); the plan and B ask for \(15, 9\)"),
        ({2: torch.ones(5, 2, 7)}, r"A is \(5, 2, 7\) .*must be \[G, E, r, K\]"),
        ({3: torch.ones(1, 5, 3, 9)}, r"B \(1, 5, 3, 9\)"),
        (
            {2: torch.ones(2, 5, 2, 7), 3: torch.ones(2, 5, 2, 9)},
            r"task axis of 2; it must be 1 or .* 4 tasks",
        ),
        ({4: torch.ones(3, 5)}, r"gates are \(3, 5\); they must be \[T, k\] with the plan's 4 tasks"),
        ({4: torch.ones(4, 2)}, r"gates have 2 slots for 5 experts"),
        ({5: torch.zeros(4, 2, dtype=torch.int64)}, r"slots are \(4, 2\) .*shape \(4, 5\)"),
        ({5: torch.zeros(4, 5)}, r"slots are \(4, 5\) torch.float32; they must be int64"),
    ],
)
def test_shapes_that_do_not_fit_are_named(make_case, change, message) -> None:
    args = list(make_case(dtype=torch.float32).args())
    for i, value in change.items():
        args[i] = value
    with pytest.raises(ValueError, match=message):
        low_rank(*args)


def test_average_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="weights are over 3 experts; the bank has 5"):
        average(torch.ones(5, 2, 12), torch.ones(4, 1, 3))
    with pytest.raises(ValueError, match="num_heads is 5; the width 12 is not a multiple"):
        average(torch.ones(5, 2, 12), torch.ones(4, 5, 5))
    with pytest.raises(ValueError, match="A has 3 and B 2 tasks; the plan has 2"):
        plan = Plan.from_rows([0, 1], 2)
        low_rank_averaged(torch.ones(2, 4), None, torch.ones(3, 1, 4), torch.ones(2, 1, 4), 1.0, plan)


def test_an_unknown_expert_is_an_error(make_case, monkeypatch) -> None:
    from taskmoe.kernels import low_rank_cpu, ways

    for plain in (little.dense, little.batched):
        case = make_case(task_of_row=[0, 1, 2, 3], slots=[[5], [0], [0], [0]])
        with pytest.raises((IndexError, RuntimeError), match=r"out of|index"):
            plain(*case.args())
    monkeypatch.setattr(little, "choose", lambda *_: None)
    for way in (ways.Dense, ways.Segments, ways.Equal):
        monkeypatch.setattr(low_rank_cpu, "choose", lambda *_, way=way: way)
        for expert in (5, -1):
            case = make_case(task_of_row=[0, 1, 2, 3], slots=[[expert], [0], [0], [0]])
            with pytest.raises((IndexError, RuntimeError), match=r"out of|index"):
                low_rank(*case.args())


def test_this_folder_does_not_shadow_another_package() -> None:
    from pathlib import Path

    # Hugging Face owns the import name `kernels`; an __init__.py here would hide it.
    assert not (Path(low_rank_module.__file__).parent / "__init__.py").exists()
