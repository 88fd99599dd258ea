"""What the kernels are compared with: the same product as a good user would write it without them.

Each peer is a function from operands to a :class:`Run`; it raises :class:`Cannot` where the routing, the
dtype or the machine is not for it. What can be prepared once a batch (indices, paddings) is prepared outside
the clock, as ours prepares its plan.

Legend: M rows, K d_in, N d_out, E experts, r rank of one expert, k slots of a task or a token, R = k*r,
C = E*r, S sequences, L rows of a sequence (padded), P = M*k pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_shapes import Operands
from torch import Tensor, nn

from taskmoe.kernels.low_rank import add_linear_, low_rank
from taskmoe.kernels.token_level import gated_low_rank, grouped_low_rank

DENSE_COLUMNS = 256  # up to here every expert meets every token, beyond rows are sorted


class Cannot(Exception):
    """This peer does not do that, with the reason."""


@dataclass(frozen=True)
class Run:
    """``forward`` gives ``[M, N]``; ``leaves`` are what a step wants gradients of. ``with_base``: the base
    layer's product is part of it."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    with_base: bool = False


def ours(o: Operands) -> Run:
    """Task-level: ``low_rank``. Token-level: every expert densely, or rows sorted by expert."""
    # The banks as the ops keep them, with their task axis.
    A, B = (bank.detach()[None].requires_grad_() for bank in (o.A, o.B))
    return Run(lambda: product(o, A, B, o.y), (o.x, A, B, o.gates))


def product(o: Operands, A: Tensor, B: Tensor, y: Tensor | None, weight: Tensor | None = None) -> Tensor:
    """Our op for the routing of the operands, added to ``y``; ``weight``: the base layer's, added too."""
    if o.shape.by_task:
        return low_rank(o.x, y, A, B, o.gates, o.slots, o.scale, o.plan, weight)
    if o.shape.E * o.shape.r > DENSE_COLUMNS and o.slots is not None:
        out = grouped_low_rank(o.x, y, A, B, o.gates, o.slots, o.scale, o.plan)
    else:
        out = gated_low_rank(o.x, y, A, B, _every_gate(o), o.scale, o.plan)
    return out if weight is None else add_linear_(out, o.x, weight)


def beside_base(o: Operands) -> dict[str, Run]:
    """The base layer alone; with ours added to its output; and accumulated onto ours, which is written first:
    nothing is read to be added to."""
    A, B = (bank.detach()[None].requires_grad_() for bank in (o.A, o.B))
    leaves = o.x, A, B, o.gates
    return {
        "base": Run(lambda: torch.mm(o.x, o.W.t()), (o.x,)),
        "base + ours": Run(lambda: product(o, A, B, torch.mm(o.x, o.W.t())), leaves),
        "ours, then base": Run(lambda: product(o, A, B, None, o.W), leaves),
    }


def loop(o: Operands) -> Run:
    """P1, experts one after another: the rows of each, found and scattered back."""
    slots = o.slots
    if slots is None:
        return Run(lambda: _loop_soft(o), o.leaves)
    by_row = slots.index_select(0, o.row_tasks) if o.shape.by_task else slots

    def forward() -> Tensor:
        gates = _row_gates(o)
        out = o.y.clone()
        for e in range(o.shape.E):
            rows, j = torch.where(by_row == e)
            h = torch.mm(o.x[rows], o.A[e].t()) * gates[rows, j, None]
            out.index_add_(0, rows, torch.mm(h, o.B[e]))
        return out

    return Run(forward, o.leaves)


def _loop_soft(o: Operands) -> Tensor:
    gates, out = _row_gates(o), o.y
    for e in range(o.shape.E):
        out = out + torch.mm(torch.mm(o.x, o.A[e].t()) * gates[:, e, None], o.B[e])
    return out


def gathered(o: Operands) -> Run:
    """P2, the bank rows of each sequence's task gathered, two batched products; ragged rows are padded."""
    if not o.shape.by_task or o.slots is None:
        raise Cannot("for a choice of experts a sequence")
    S, (N, K, r, k) = len(o.lengths), (o.shape.N, o.shape.K, o.shape.r, o.slots.shape[1])
    tasks = torch.tensor(o.sequence_tasks, device=o.x.device)
    experts = o.slots.index_select(0, tasks).flatten()
    L, padded = max(o.lengths), len(set(o.lengths)) > 1
    if padded:
        places = torch.cat([torch.arange(s * L, s * L + n) for s, n in enumerate(o.lengths)]).to(o.x.device)

    def forward() -> Tensor:
        A_SRK = o.A.index_select(0, experts).view(S, k * r, K)
        B_SRN = o.B.index_select(0, experts).view(S, k * r, N)
        g_S1R = (o.gates * o.scale).to(o.x.dtype).repeat_interleave(r, 1).index_select(0, tasks).unsqueeze(1)
        x = o.x.new_zeros(S * L, K).index_copy(0, places, o.x) if padded else o.x
        h_SLR = torch.bmm(x.view(S, L, K), A_SRK.transpose(1, 2)) * g_S1R
        if padded:
            return o.y + torch.bmm(h_SLR, B_SRN).view(S * L, N).index_select(0, places)
        return torch.baddbmm(o.y.view(S, L, N), h_SLR, B_SRN).view(S * L, N)

    return Run(forward, o.leaves)


def grouped_mm(o: Operands) -> Run:
    """P3, torch's grouped product twice: over the segments of tasks, or over pairs sorted by expert."""
    product = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None:
        raise Cannot("torch has no grouped_mm")
    if o.slots is None:
        raise Cannot("for a choice of experts")
    r, k, E = o.shape.r, o.slots.shape[1], o.shape.E
    columns = k * r if o.shape.by_task else r
    if columns * o.x.element_size() % 16:
        raise Cannot(f"{columns} columns are not a multiple of 16 bytes")
    if o.shape.by_task:
        tasks = torch.tensor(o.plan.tasks, device=o.x.device)
        experts = o.slots.index_select(0, tasks).flatten()
        ends = torch.tensor(o.plan.offsets[1:], dtype=torch.int32, device=o.x.device)

        def by_segment() -> Tensor:
            A_SRK = o.A.index_select(0, experts).view(len(tasks), k * r, -1)
            B_SRN = o.B.index_select(0, experts).view(len(tasks), k * r, -1)
            s_MR = product(o.x, A_SRK.transpose(1, 2), offs=ends)
            g_TR = (o.gates * o.scale).to(o.x.dtype).repeat_interleave(r, 1)
            return o.y + product(s_MR * g_TR.index_select(0, o.row_tasks), B_SRN, offs=ends)

        return Run(by_segment, o.leaves)

    slots = o.slots

    def by_expert() -> Tensor:
        order = slots.flatten().argsort(stable=True)
        ends = slots.flatten().bincount(minlength=E).cumsum(0).int()
        tokens = order // k
        s_Pr = product(o.x.index_select(0, tokens), o.A.transpose(1, 2), offs=ends)
        h_Pr = s_Pr * (o.gates.flatten() * o.scale).to(o.x.dtype).index_select(0, order)[:, None]
        return o.y.index_add(0, tokens, product(h_Pr, o.B, offs=ends))

    return Run(by_expert, o.leaves)


def dense(o: Operands) -> Run:
    """P4, every row times every expert; gates are zero where an expert is not used."""

    def forward() -> Tensor:
        g = (_every_gate(o) * o.scale).to(o.x.dtype).repeat_interleave(o.shape.r, 1)
        g_MC = g.index_select(0, o.row_tasks) if o.shape.by_task else g
        h_MC = torch.mm(o.x, o.A.flatten(0, 1).t()) * g_MC
        return torch.addmm(o.y, h_MC, o.B.flatten(0, 1))

    return Run(forward, o.leaves)


def segments(o: Operands) -> Run:
    """P5, one pair of products for each run of rows of one task."""
    if not o.shape.by_task:
        raise Cannot("for a choice of experts a sequence")
    runs = o.plan.segments()

    def forward() -> Tensor:
        g_TR = (o.gates * o.scale).to(o.x.dtype).repeat_interleave(o.shape.r, 1)
        parts = []
        for t, a, b in runs:
            A = (o.A if o.slots is None else o.A.index_select(0, o.slots[t])).flatten(0, 1)
            B = (o.B if o.slots is None else o.B.index_select(0, o.slots[t])).flatten(0, 1)
            parts.append(torch.addmm(o.y[a:b], torch.mm(o.x[a:b], A.t()) * g_TR[t], B))
        return torch.cat(parts)

    return Run(forward, o.leaves)


def compiled(peer: Callable[[Operands], Run]) -> Callable[[Operands], Run]:
    """P6, another peer under torch.compile."""

    def build(o: Operands) -> Run:
        run = peer(o)
        return Run(torch.compile(run.forward, dynamic=False), run.leaves)

    return build


def peft_lora(o: Operands) -> Run:
    """P7, peft's LoRA layer with an adapter of rank R for each task, chosen by name for each sequence.

    The adapters are copies with the gates in their B: its gradients are those of T separate banks.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear
    except ImportError:
        raise Cannot("peft is not installed") from None
    if not o.shape.by_task or len(set(o.lengths)) > 1:
        raise Cannot("for sequences of one length")
    base = nn.Linear(o.shape.K, o.shape.N, bias=False, device="meta")
    base.weight = nn.Parameter(o.W, requires_grad=False)
    tasks = range(len(o.gates))
    settings = {"r": o.shape.R, "lora_alpha": o.shape.R * o.scale}
    layer = Linear(base, "0", LoraConfig(**settings), **settings)
    for t in tasks[1:]:
        layer.update_layer(str(t), o.shape.R, o.shape.R * o.scale, LoraConfig(**settings))
    for t in tasks:
        slots = slice(None) if o.slots is None else o.slots[t]
        gated = o.B.detach()[slots] * o.gates.detach()[t, :, None, None].to(o.B.dtype)
        for factor, weight in (
            (layer.lora_A[str(t)], o.A.detach()[slots].flatten(0, 1)),
            (layer.lora_B[str(t)], gated.flatten(0, 1).t().contiguous()),
        ):
            factor.weight = nn.Parameter(weight.clone())
    names = [str(t) for t in o.sequence_tasks]
    used = sorted(set(names))
    leaves = (o.x, *(f[n].weight for n in used for f in (layer.lora_A, layer.lora_B)))
    by_sequence = (len(names), o.shape.length, -1)


    def forward() -> Tensor:
        return layer(o.x.view(by_sequence), adapter_names=names).flatten(0, 1)

    return Run(forward, leaves, with_base=True)


def scattermoe(o: Operands) -> Run:
    """P8, scattermoe's two-layer MLP of experts without an activation."""
    try:
        from scattermoe.mlp import MLP
        from scattermoe.parallel_experts import ParallelExperts
    except ImportError:
        raise Cannot("scattermoe is not installed") from None
    if o.slots is None or not o.x.is_cuda:
        raise Cannot("for a choice of experts on a GPU")
    E, r, K, N = o.shape.E, o.shape.r, o.shape.K, o.shape.N
    mlp = MLP(input_size=K, hidden_size=r, num_experts=E, top_k=o.slots.shape[1], activation=nn.Identity())
    mlp.output_experts = ParallelExperts(E, r, N)
    by_row = o.slots.index_select(0, o.row_tasks) if o.shape.by_task else o.slots

    def forward() -> Tensor:
        weights = {"experts.weight": o.A, "output_experts.weight": o.B.transpose(1, 2)}
        return o.y + torch.func.functional_call(mlp, weights, (o.x, _row_gates(o), by_row))

    return Run(forward, o.leaves)


def _row_gates(o: Operands) -> Tensor:
    """Gates times scale of each row, ``[M, k]``, in the dtype of x."""
    gates = (o.gates * o.scale).to(o.x.dtype)
    return gates.index_select(0, o.row_tasks) if o.shape.by_task else gates


def _every_gate(o: Operands) -> Tensor:
    """One gate for each expert, ``[T or M, E]``."""
    if o.slots is None:
        return o.gates
    return o.gates.new_zeros(len(o.gates), o.shape.E).scatter(1, o.slots, o.gates)


PLAIN = "P4 dense"  # the yardstick of correctness: plain torch, any routing
PEERS: dict[str, Callable[[Operands], Run]] = {
    "P1 loop": loop,
    "P2 gathered": gathered,
    "P3 grouped_mm": grouped_mm,
    PLAIN: dense,
    "P5 segments": segments,
    "P6 compiled P2": compiled(gathered),
    "P6 compiled P4": compiled(dense),
    "P7 peft": peft_lora,
    "P8 scattermoe": scattermoe,
}
