"""J: one row a task, one column a shared parameter's entry; each rank ends up with a block of the columns.

Legend: R rows, W ranks, n entries of one parameter, s = ceil(n / W) columns of it a rank, G rows of one
addition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from taskmoe.train.distributed import scatter_sum
from taskmoe.train.surgery.gramian import gramian


class TaskMatrix:
    """Sums of task gradients, fp32 (fp64 for fp64), a block [R, s] a parameter.

    With several ranks the sum over them is taken at once (``eager``: the memory of a rank is its block, the
    traffic one reduction an addition) or in :meth:`reduce` (a whole row set a rank, one reduction a step).
    Eager additions must come in the same order on all ranks.

    Args:
        shapes: of the whole parameters, in an order that all ranks share.
        like: {name: a tensor of the dtype and on the device of its parameter}, for those that this rank has
            nothing of; default: fp32 on the CPU.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        rank: int = 0,
        world_size: int = 1,
        eager: bool = True,
        like: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.rank, self.world_size = rank, world_size
        self.eager = eager and world_size > 1
        self._like = like or {}
        self.num_rows = 0
        self._sums: dict[str, Tensor] = {}
        self._reduced = False

    def clear(self, num_rows: int = 0) -> None:
        """Forget the sums; ``num_rows`` rows follow (a single rank may add more)."""
        self._sums, self.num_rows, self._reduced = {}, num_rows, False

    def columns(self, name: str) -> int:
        """s, the columns of a parameter in this rank's block (the last rank's may hold padding)."""
        return -(-self.shapes[name].numel() // self.world_size)

    def add(self, name: str, rows: Sequence[int], parts: Tensor) -> None:
        """Add this rank's ``parts`` [G, *shape] to these rows. The tensor may be kept: do not change it."""
        flat_Gn = _accumulated(parts).reshape(len(rows), self.shapes[name].numel())
        if self.eager:
            self._add(name, range(self.num_rows), self._scattered(self._spread(rows, flat_Gn)))
        else:
            self._add(name, rows, flat_Gn)

    def add_whole(self, name: str, parts: Tensor) -> None:
        """Add [R, *shape] that is summed over the ranks already, and equal on all; after :meth:`reduce`."""
        padded = self._padded(_accumulated(parts).reshape(self.num_rows, -1))
        self._add(name, range(self.num_rows), padded.view(self.num_rows, self.world_size, -1)[:, self.rank])

    def merge_halves(self) -> None:
        """Add the second half of the rows to the first."""
        self._sums = {n: rows.view(2, self.num_rows // 2, -1).sum(0) for n, rows in self._sums.items()}
        self.num_rows //= 2

    def reduce(self) -> None:
        """Sum over the ranks what is not yet summed; a collective, whatever this rank holds."""
        if self._reduced:
            return
        self._reduced = True
        if self.world_size == 1 or self.eager:
            return
        for name in self.shapes:
            rows_Rn = self._sums.pop(name, None)
            if rows_Rn is None:
                like = _accumulated(self._like.get(name, torch.empty(0)).new_empty(0))
                rows_Rn = like.new_zeros(self.num_rows, self.shapes[name].numel())
            self._sums[name] = self._scattered(self._spread(range(len(rows_Rn)), rows_Rn))

    def block(self, name: str) -> Tensor | None:
        """[R, s], this rank's columns of a parameter; None: all zeros."""
        block = self._sums.get(name)
        return None if block is None else self._grown(block)

    def gramian(self, names: Iterable[str]) -> Tensor:
        """fp64 [R, R] on the CPU: what this rank's columns of these parameters add to J J'."""
        G_RR = torch.zeros(self.num_rows, self.num_rows, dtype=torch.float64)
        for name in names:
            block = self.block(name)
            if block is not None:
                G_RR += gramian(block)
        return G_RR

    def weighted(self, name: str, weights_R: Tensor) -> Tensor | None:
        """w' J, [s], this rank's columns of a parameter; None: all zeros."""
        block = self.block(name)
        return None if block is None else weights_R.to(block.device, block.dtype) @ block

    def place(self, name: str, columns_s: Tensor) -> Tensor:
        """A tensor of the parameter's shape that holds this rank's columns, zeros elsewhere."""
        shape = self.shapes[name]
        if self.world_size == 1:
            return columns_s.view(shape)
        whole = columns_s.new_zeros(self.world_size, columns_s.numel())
        whole[self.rank] = columns_s
        return whole.view(-1)[: shape.numel()].view(shape)

    def _add(self, name: str, rows: Sequence[int], flat: Tensor) -> None:
        R, sums = self.num_rows, self._sums.get(name)
        if not len(rows):
            return
        in_order = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        if sums is None and in_order and len(rows) == R:
            # One row may be the very tensor that autograd goes on with.
            self._sums[name] = flat.clone() if R == 1 else flat
            return
        sums = flat.new_zeros(R, flat.shape[1]) if sums is None else self._grown(sums)
        if in_order:
            sums[rows[0] : rows[0] + len(rows)] += flat
        else:
            index = torch.tensor(rows, device=flat.device)
            sums.index_put_((index,), flat, accumulate=True)  # sorts; index_add_ uses atomics on a GPU
        self._sums[name] = sums

    def _grown(self, sums: Tensor) -> Tensor:
        missing = self.num_rows - len(sums)
        return torch.cat([sums, sums.new_zeros(missing, sums.shape[1])]) if missing else sums

    def _padded(self, flat_Gn: Tensor) -> Tensor:
        missing = -flat_Gn.shape[1] % self.world_size
        return torch.nn.functional.pad(flat_Gn, (0, missing)) if missing else flat_Gn

    def _spread(self, rows: Sequence[int], flat_Gn: Tensor) -> Tensor:
        """[W, R, s], contiguous: what each rank is to get."""
        if list(rows) != list(range(self.num_rows)):
            spread_Rn = flat_Gn.new_zeros(self.num_rows, flat_Gn.shape[1])
            for row, part_n in zip(rows, flat_Gn, strict=True):
                spread_Rn[row] += part_n
            flat_Gn = spread_Rn
        padded = self._padded(flat_Gn)
        return padded.view(self.num_rows, self.world_size, -1).transpose(0, 1).contiguous()

    def _scattered(self, spread_WRs: Tensor) -> Tensor:
        return scatter_sum(spread_WRs)


def _accumulated(parts: Tensor) -> Tensor:
    return parts.detach() if parts.dtype in (torch.float32, torch.float64) else parts.detach().float()
