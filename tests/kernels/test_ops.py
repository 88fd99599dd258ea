from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from taskmoe.kernels import low_rank_cpu, ops, token_cpu
from taskmoe.kernels.low_rank import low_rank
from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import expand, shrink
from taskmoe.kernels.token_level import gated_low_rank, grouped_low_rank


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a process that has asked for nothing yet, and afterwards again."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ops._obstacle.cache_clear()
    ops._warn.cache_clear()
    yield monkeypatch
    ops._obstacle.cache_clear()
    ops._warn.cache_clear()


def test_the_mode_is_read_at_each_call(fresh: pytest.MonkeyPatch) -> None:
    fresh.delenv("TASKMOE_KERNELS", raising=False)
    assert ops.mode() == "auto"
    for value in ops.MODES:
        fresh.setenv("TASKMOE_KERNELS", value)
        assert ops.mode() == value
    fresh.setenv("TASKMOE_KERNELS", "Triton")
    with pytest.raises(ValueError, match="TASKMOE_KERNELS is 'Triton'; use one of auto, triton, reference"):
        ops.use_triton(torch.ones(1))


@pytest.mark.parametrize("value", ["auto", "reference"])
def test_the_cpu_asks_for_nothing(fresh: pytest.MonkeyPatch, value: str) -> None:
    fresh.setenv("TASKMOE_KERNELS", value)
    fresh.setattr(importlib.util, "find_spec", lambda name: pytest.fail("Triton was looked for"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ops.use_triton(torch.ones(1))


def test_without_the_interpreter_one_warning_and_the_plain_result(fresh, make_case) -> None:
    case = make_case(k=2)
    truth = low_rank(*case.args())
    fresh.setenv("TASKMOE_KERNELS", "triton")
    with pytest.warns(UserWarning, match=r"on the CPU they need .*TRITON_INTERPRET=1.*plain torch") as caught:
        for _ in range(3):
            out = low_rank(*case.args())
            out.sum().backward()
    assert len(caught) == 1
    assert torch.equal(out, truth)


def test_without_triton_one_warning_and_the_plain_result(fresh, make_case) -> None:
    case = make_case(k=2)
    truth = low_rank(*case.args())
    fresh.setenv("TASKMOE_KERNELS", "triton")
    fresh.setenv("TRITON_INTERPRET", "1")
    fresh.setattr(ops, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="triton is not installed; plain torch") as caught:
        for _ in range(3):
            out = low_rank(*case.args())
    assert len(caught) == 1
    assert torch.equal(out, truth)


def test_what_triton_does_not_take(fresh) -> None:
    if importlib.util.find_spec("triton") is None:
        fresh.setattr(ops, "find_spec", lambda name: object())
    fresh.setenv("TASKMOE_KERNELS", "triton")
    fresh.setenv("TRITON_INTERPRET", "1")
    with pytest.warns(UserWarning, match=r"they do not take torch\.float8_e4m3fn"):
        assert not ops.use_triton(torch.ones(1).to(torch.float8_e4m3fn))
    with pytest.warns(UserWarning, match="interpreter computes bfloat16 wrongly"):
        assert not ops.use_triton(torch.ones(1, dtype=torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(ops.use_triton(torch.ones(1, dtype=d)) for d in ops.DTYPES if d != torch.bfloat16)


def test_an_old_gpu_falls_back(fresh) -> None:
    if importlib.util.find_spec("triton") is None:
        fresh.setattr(ops, "find_spec", lambda name: object())
    device = torch.device("cuda", 0)
    fresh.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    fresh.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    assert ops._obstacle(device, torch.float16) == "they need compute capability 8.0; T4 has less"
    ops._obstacle.cache_clear()
    fresh.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert ops._obstacle(device, torch.float16) is None


def test_an_op_goes_where_it_is_sent(fresh, op_arguments) -> None:
    """The dispatch itself, with Triton's functions told apart by what they return."""
    arguments = next(args for name, args in op_arguments() if name == "shrink_fwd")
    plain = torch.ops.taskmoe.shrink_fwd.default(*arguments)
    gpu = pytest.importorskip("taskmoe.kernels.low_rank_gpu")
    fresh.setattr(gpu, "shrink_fwd", lambda x, *rest: torch.full_like(plain, 7.0))
    fresh.setattr(ops, "use_triton", lambda x: True)
    assert bool((torch.ops.taskmoe.shrink_fwd.default(*arguments) == 7).all())
    fresh.setattr(ops, "use_triton", lambda x: False)
    assert torch.equal(torch.ops.taskmoe.shrink_fwd.default(*arguments), plain)


def test_both_implementations_of_an_op_take_the_same_arguments() -> None:
    import inspect

    gpu = pytest.importorskip("taskmoe.kernels.low_rank_gpu")
    for name in ops.OPS:
        plain = getattr(low_rank_cpu, name, None) or getattr(token_cpu, name)
        assert len(inspect.signature(plain).parameters) == len(
            inspect.signature(getattr(gpu, name)).parameters
        )


def test_every_op_is_well_behaved(op_arguments) -> None:
    seen = set()
    for name, args in op_arguments():
        # Tracing takes seconds: once an op.
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if name not in seen:
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(torch.ops.taskmoe, name).default, args, test_utils=tests)
        seen.add(name)
    assert seen == set(ops.OPS) and len(seen) == 10


def test_results_do_not_alias_what_they_are_made_of(op_arguments) -> None:
    for name, args in op_arguments():
        found = getattr(torch.ops.taskmoe, name).default(*args)
        given = {t.untyped_storage().data_ptr() for t in args if torch.is_tensor(t) and t.numel()}
        own = [
            t.untyped_storage().data_ptr()
            for t in ((found,) if torch.is_tensor(found) else found)
            if t.numel()
        ]
        assert not given & set(own) and len(set(own)) == len(own), name


T, E, r, K, N = 3, 4, 2, 8, 6


def leaves(M: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (M, K), "y": (M, N), "A": (1, E, r, K), "B": (1, E, r, N), "tasks": (T, 2), "rows": (M, E)}
    return {name: torch.randn(shape, generator=g).requires_grad_() for name, shape in shapes.items()}


def of_low_rank(at: dict[str, Tensor], plan: Plan) -> Tensor:
    return low_rank(2 * at["x"], at["y"], at["A"], at["B"], at["tasks"], SLOTS, 0.5, plan).tanh()


def of_halves(at: dict[str, Tensor], plan: Plan) -> Tensor:
    first, second = shrink(2 * at["x"], [at["A"], at["A"] + 1], [SLOTS, SLOTS.flip(1)], plan)
    return expand(first + second, at["y"], at["B"], at["tasks"], SLOTS, 0.5, plan).tanh()


def of_gated(at: dict[str, Tensor], plan: Plan) -> Tensor:
    return gated_low_rank(2 * at["x"], at["y"], at["A"], at["B"], at["rows"], 0.5, plan).tanh()


def of_grouped(at: dict[str, Tensor], plan: Plan) -> Tensor:
    gates, slots = at["rows"].topk(2)
    return grouped_low_rank(2 * at["x"], at["y"], at["A"], at["B"], gates, slots, 0.5, plan).tanh()


SLOTS = torch.tensor([[0, 1], [3, 3], [2, 0]])


def step(function: Callable[..., Tensor], at: dict[str, Tensor], plan: Plan) -> list[Tensor]:
    out = function(at, plan)
    grads = torch.autograd.grad(out.sum(), list(at.values()), allow_unused=True)
    return [out, *(g for g in grads if g is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("function", [of_low_rank, of_halves, of_gated, of_grouped])
def test_one_graph_under_compile_for_any_number_of_rows(function) -> None:
    graphs = []

    def backend(module, example):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    for compiler, sizes in ((backend, (6, 9, 12, 21)), ("inductor", (6,))):
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        for M in sizes:
            at, plan = leaves(M), Plan.from_rows([0] * (M // 3) + [2] * (M - M // 3), T)
            torch.testing.assert_close(step(compiled, at, plan), step(function, at, plan))
    # One graph for the first number of rows, one for any other: no third.
    assert 1 <= len(graphs) <= 2
    torch._dynamo.reset()
