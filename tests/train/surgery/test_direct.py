from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError
from taskmoe.train.choices import generator
from taskmoe.train.surgery.base import SurgeryError
from taskmoe.train.surgery.direct import DIRECT, DirectSurgery

SIZES = [4, 0, 5, 3]  # one layer without a column, as a shard may have


def stored(state: dict) -> dict:
    """What a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def gradvac_of_vectors(J_TP: Tensor, phi_TT: Tensor, beta: float, gen: torch.Generator) -> Tensor:
    """The paper's algorithm 1 on one layer's gradients; changes ``phi_TT``."""
    out = torch.zeros_like(J_TP[0])
    for i in range(len(J_TP)):
        g = J_TP[i].clone()
        for j in torch.randperm(len(J_TP), generator=gen).tolist():
            if j == i:
                continue
            cos, phi = float(g @ J_TP[j] / g.norm() / J_TP[j].norm()), float(phi_TT[i, j])
            if cos < phi:
                lack = phi * math.sqrt(1 - cos**2) - cos * math.sqrt(1 - phi**2)
                g = g + g.norm() * lack / (J_TP[j].norm() * math.sqrt(1 - phi**2)) * J_TP[j]
                reached = float(g @ J_TP[j] / g.norm() / J_TP[j].norm())
                assert reached == pytest.approx(phi, abs=1e-9)  # that is what the formula is for
            phi_TT[i, j] = (1 - beta) * phi + beta * cos
        out += g
    return out


def test_gradvac_is_its_definition_layer_by_layer(jacobian) -> None:
    surgery, phis = DirectSurgery("gradvac", {"beta": 0.3}, seed=2), torch.zeros(4, 3, 3, dtype=torch.float64)
    for step in range(4):
        J_TP = jacobian(3, 12, seed=step, together=0.5)
        gen = generator(2, step)
        parts = J_TP.split(SIZES, dim=1)
        want_P = torch.cat(
            [gradvac_of_vectors(p, phis[s], 0.3, gen) for s, p in enumerate(parts) if p.shape[1]]
        )
        got_P = surgery.combine(J_TP, SIZES, step)
        assert (got_P - want_P).norm() <= 1e-12 * want_P.norm()
    assert torch.allclose(surgery.state_dict()["method"]["phi"], phis)
    assert phis.max() > 0.05  # targets above zero were met


def test_the_first_step_of_gradvac_is_pcgrad_per_layer() -> None:
    """g_0 = (1, 0), g_1 = (-1, 1): each loses its part along the other."""
    J_TP = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    d_P = DirectSurgery("gradvac").combine(torch.cat([J_TP, J_TP], 1), [2, 2], 0)
    assert torch.allclose(d_P, torch.tensor([0.5, 1.5, 0.5, 1.5], dtype=torch.float64), atol=1e-14)


def test_gradvac_survives_gradients_that_cancel_or_coincide() -> None:
    row_P = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    surgery = DirectSurgery("gradvac", {"beta": 1.0})
    for step, J_TP in enumerate([torch.stack([row_P, row_P]), torch.stack([row_P, -row_P])] * 3):
        assert surgery.combine(J_TP, [3], step).isfinite().all()


def test_gradvac_keeps_its_targets_by_task_id(jacobian) -> None:
    J_TP = jacobian(3, 6)
    surgery = DirectSurgery("gradvac")
    surgery.combine(J_TP[:2], [6], 0, rows=[4, 1])
    phi_TT = surgery.state_dict()["method"]["phi"][0]
    assert phi_TT.nonzero().tolist() == [[1, 4], [4, 1]]
    surgery.combine(J_TP, [6], 1, rows=[0, 4, 6])
    wider_TT = surgery.state_dict()["method"]["phi"][0]
    assert wider_TT.shape == (7, 7)
    assert wider_TT[1, 4] == phi_TT[1, 4]


def test_graddrop_by_hand() -> None:
    """Signs that agree pass; where they do not, one sign passes whole, as often as its share of the mass."""
    J_TP = torch.tensor([[3.0, 1.0, -2.0, 0.0], [-1.0, 2.0, -1.0, 0.0]], dtype=torch.float64)
    surgery = DirectSurgery("graddrop", seed=1)
    draws_nP = torch.stack([surgery.combine(J_TP, [4], step) for step in range(400)])
    assert draws_nP[:, 1:].unique(dim=0).tolist() == [[3.0, -3.0, 0.0]]
    assert sorted(draws_nP[:, 0].unique().tolist()) == [-1.0, 3.0]
    assert float((draws_nP[:, 0] == 3).double().mean()) == pytest.approx(3 / 4, abs=0.07)
    leaky = DirectSurgery("graddrop", {"leak": 1.0}).combine(J_TP, [4], 0)
    assert torch.equal(leaky, J_TP.sum(0))


def test_graddrop_draws_each_entry_anew(jacobian) -> None:
    J_TP = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 4000)
    d_P = DirectSurgery("graddrop").combine(J_TP, [4000], 0)
    assert set(d_P.tolist()) == {-1.0, 1.0}
    assert abs(float(d_P.mean())) < 0.05
    assert abs(float((d_P[1:] * d_P[:-1]).mean())) < 0.05


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("cut", [1, 6, 11])
def test_shards_give_what_the_whole_gives(jacobian, name: str, cut: int) -> None:
    """Two ranks with a block of columns each, and Gramians added over them."""
    whole, halves = DirectSurgery(name, seed=3), [DirectSurgery(name, seed=3) for _ in range(2)]
    seen: list[Tensor] = []
    layer = torch.repeat_interleave(torch.arange(4), torch.tensor(SIZES))
    blocks = [slice(0, cut), slice(cut, 12)]
    for step in range(3):
        J_TP = jacobian(4, 12, seed=step)
        want_P = whole.combine(J_TP, SIZES, step)
        seen.clear()
        sizes = [torch.bincount(layer[block], minlength=4).tolist() for block in blocks]
        for half, block, size in zip(halves, blocks, sizes, strict=True):  # what each rank would contribute
            probe = DirectSurgery(name, seed=3)
            probe.load_state_dict(half.state_dict())
            probe.combine(J_TP[:, block], size, step, reduce=lambda G_STT: seen.append(G_STT) or G_STT)
        total = (lambda G_STT: seen[0] + seen[1]) if seen else None
        got_P = torch.cat(
            [
                half.combine(J_TP[:, block], size, step, offset=block.start, reduce=total)
                for half, block, size in zip(halves, blocks, sizes, strict=True)
            ]
        )
        assert torch.allclose(got_P, want_P, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DIRECT)
def test_a_resumed_run_goes_on_where_it_was(jacobian, name: str) -> None:
    steady, resumed = DirectSurgery(name, seed=3), DirectSurgery(name, seed=3)
    for step in range(4):
        want_P = steady.combine(jacobian(3, 12, seed=step), SIZES, step)
        if step == 2:
            state = stored(resumed.state_dict())
            resumed = DirectSurgery(name, seed=3)
            resumed.load_state_dict(state)
        assert torch.equal(resumed.combine(jacobian(3, 12, seed=step), SIZES, step), want_P)
    with pytest.raises(ConfigError, match=r"surgery\.seed: the checkpoint has 3, this run 4"):
        DirectSurgery(name, seed=4).load_state_dict(state)


@pytest.mark.parametrize("name", DIRECT)
def test_absent_tasks_change_nothing(jacobian, name: str) -> None:
    J_TP = jacobian(3, 12)
    wide_TP = torch.zeros(5, 12, dtype=torch.float64)
    wide_TP[[0, 2, 4]] = J_TP
    got_P = DirectSurgery(name).combine(wide_TP, SIZES, 0)
    assert torch.allclose(got_P, DirectSurgery(name).combine(J_TP, SIZES, 0, rows=[0, 2, 4]), atol=1e-12)
    assert DirectSurgery(name).combine(0 * wide_TP, SIZES, 0).tolist() == [0.0] * 12


@pytest.mark.parametrize("name", DIRECT)
def test_the_dtype_is_the_gradients(jacobian, name: str) -> None:
    assert DirectSurgery(name).combine(jacobian(3, 12).float(), SIZES, 0).dtype == torch.float32


@pytest.mark.parametrize("name", DIRECT)
def test_gradients_that_are_not_finite_are_named(jacobian, name: str) -> None:
    J_TP = jacobian(3, 12)
    J_TP[1, 5] = float("inf")
    with pytest.raises(SurgeryError, match=r"step 4: the gradient of task 8 is not finite"):
        DirectSurgery(name).combine(J_TP, SIZES, 4, rows=[2, 8, 9])


def test_wrong_arguments_are_errors(jacobian) -> None:
    with pytest.raises(ValueError, match=r"\[3, 12\] for 3 rows and 11 columns"):
        DirectSurgery("gradvac").combine(jacobian(3, 12), [4, 7], 0)
    with pytest.raises(ConfigError, match=r"surgery\.options\.beta: 2 is no finite number >= 0 and <= 1"):
        DirectSurgery("gradvac", {"beta": 2})
    with pytest.raises(ConfigError, match=r"surgery\.options\.leek: 'graddrop' has no such option.*leak"):
        DirectSurgery("graddrop", {"leek": 0.5})
