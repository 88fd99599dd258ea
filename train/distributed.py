"""The ranks of a run: who am I, who else is there, and the few things they tell each other.

The same program runs under the `deepspeed` launcher, under torchrun, and alone. Alone it gives itself the
environment a launcher would have set, since DeepSpeed otherwise searches for MPI.
"""

from __future__ import annotations

import glob
import logging
import os
import socket
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from taskmoe.moe.config import ConfigError

if TYPE_CHECKING:
    from taskmoe.train.config import Config

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Set per process by starters that are no torch launcher; a run below them would be N runs in one folder.
FOREIGN_WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    owns_group: bool = True  # False: the group was there before; `shutdown` leaves it alone
    own_variables: tuple[str, ...] = ()  # environment variables `init` had to set itself

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only one that speaks and writes shared files."""
        return self.rank == 0


def init(config: Config | None = None, *, timeout_s: float = 3600.0) -> Ranks:
    """Joins the other ranks (gloo on a CPU, nccl on GPUs) and returns this one's place among them.

    An existing process group is used as it is. `timeout_s` bounds each collective: generous, because rank 0
    tokenises and writes while the others wait; a rank that dies is noticed by the launcher at once.

    Raises:
        ConfigError: the launcher's variables are incomplete, there are more ranks than GPUs, or `bf16` is
            asked of a GPU that has none.
    """
    existed = dist.is_initialized()
    own_variables = _complete_environment(existed)
    rank, world_size, local_rank = (int(os.environ[name]) for name in LAUNCHER_VARIABLES[:3])
    device = _device(config, local_rank)
    quieten(rank)
    import deepspeed  # late: importing it chooses the accelerator, which _device has settled

    disable_shared_memory_op()
    if not existed:
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(
            backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s)
        )
    return Ranks(rank, world_size, local_rank, device, owns_group=not existed, own_variables=own_variables)


def shutdown(ranks: Ranks | None = None) -> None:
    """Leaves the process group; belongs into a `finally`. A process that ends without it may abort.

    Does nothing when `ranks` joined a group that somebody else had made.
    """
    if ranks is not None and not ranks.owns_group:
        return
    port = os.environ.get("MASTER_PORT")
    try:
        if dist.is_initialized():
            import deepspeed

            # DeepSpeed keeps references to groups of its own; its function drops those too.
            if deepspeed.comm.is_initialized():
                deepspeed.comm.destroy_process_group()
            else:
                dist.destroy_process_group()
    finally:
        if port is not None:
            remove_shared_memory(port)
        for name in ranks.own_variables if ranks is not None else ():
            os.environ.pop(name, None)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at the moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def disable_shared_memory_op() -> None:
    """Keeps DeepSpeed from compiling its shared-memory all-reduce at start on a CPU.

    It would need a compiler and half a minute, leave its buffers in /dev/shm, and serve inference only. The
    dictionary is private to DeepSpeed: where a version does not ask it, `shutdown` removes the buffers.
    """
    import deepspeed

    compatible = vars(deepspeed.ops).get("__compatible_ops__")
    if isinstance(compatible, dict):
        compatible["deepspeed_shm_comm"] = False
    else:
        # Asking for it would compile a test program for every op, with the linker's complaints on stderr.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def remove_shared_memory(port: int | str, folder: str = "/dev/shm") -> list[str]:
    """Removes the shared-memory buffers of the run that met at `port`; returns what was removed."""
    removed = []
    pattern = f"deepspeed_allreduce_buffer*_{os.getuid()}_*_{port}_*"
    for path in glob.glob(os.path.join(folder, pattern)):
        try:
            os.unlink(path)
        except OSError:  # another rank of the same run was faster
            continue
        removed.append(path)
    return removed


class _CurrentStderr:
    """Writes to whatever sys.stderr is at that moment: a logger's handler outlives redirections."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def quieten(rank: int) -> None:
    """Lets the libraries speak from warnings upwards on rank 0, from errors upwards elsewhere; on stderr."""
    level = logging.WARNING if rank == 0 else logging.ERROR
    import datasets
    import deepspeed
    import transformers

    logger = deepspeed.utils.logger
    logger.setLevel(level)
    for handler in logger.handlers:
        # DeepSpeed logs to stdout, where `--json` promises nothing but JSON.
        if type(handler) is logging.StreamHandler:  # not a subclass: those own their stream
            handler.setStream(_CurrentStderr())
    transformers.utils.logging.set_verbosity(level)
    datasets.utils.logging.set_verbosity(level)
    if rank != 0:
        transformers.utils.logging.disable_progress_bar()
        datasets.utils.logging.disable_progress_bar()
    # torch renamed two collectives in 2.13; DeepSpeed still calls the old names.
    renamed = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over the ranks, any shape, as a new tensor on the same device."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def all_max(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise maximum of `tensor` over the ranks, as a new tensor on the same device."""
    return _reduced(tensor, dist.ReduceOp.MAX)


def scatter_sum(tensor: torch.Tensor) -> torch.Tensor:
    """[W, ...] on each of W ranks -> [...]: entry `rank` of the sum over the ranks, on the same device."""
    if not _several():
        return tensor[0]
    given = tensor.to(_collective_device()).contiguous()
    result = torch.empty_like(given[0])
    # torch 2.13 renamed it.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce_scatter(result.view(-1), given.view(-1))
    return result.to(tensor.device)


def broadcast_object(value: Value, source: int = 0) -> Value:
    """Rank `source`'s `value` (picklable) on every rank."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=_collective_device())
    return box[0]


def gather_objects(value: Value) -> list[Value]:
    """Every rank's `value` (picklable), in rank order, on every rank."""
    if not _several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def exchange_failures(failure: str, patience_s: float) -> dict[int, str]:
    """Tells the other ranks how this one fared ("": well); returns {rank: failure}, empty when all are well.

    Goes through the group's key-value store: a collective would have to be given up when another rank
    stands in one of its own, and leaving the group waits for collectives that were given up. Once a failure
    is known, the ranks that have not answered get `patience_s` seconds; they are then left out.

    Raises:
        RuntimeError: another rank is gone.
    """
    if not _several():
        return {0: failure} if failure else {}
    # What init_process_group keeps; torch has no public way to it.
    store = dist.distributed_c10d._get_default_store()
    rank, size = dist.get_rank(), dist.get_world_size()
    turn = store.add(f"taskmoe/turn/{rank}", 1)
    store.set(f"taskmoe/report/{turn}/{rank}", "." + failure)
    if turn > 2:  # read by all, or they would not have come this far
        store.delete_key(f"taskmoe/report/{turn - 2}/{rank}")
    reports: dict[int, str] = {}
    deadline, pause = None, 0.002
    while True:
        for other in set(range(size)) - set(reports):
            if store.check([key := f"taskmoe/report/{turn}/{other}"]):
                reports[other] = store.get(key).decode(errors="replace")[1:]
        failures = {other: text for other, text in sorted(reports.items()) if text}
        if failures and deadline is None:
            deadline = time.monotonic() + patience_s
        if len(reports) == size:
            barrier()  # the store lives in one of the ranks, which must not leave before all have read
            return failures
        if deadline is not None and time.monotonic() > deadline:
            return failures
        time.sleep(pause)
        pause = min(0.1, 1.5 * pause)


def barrier() -> None:
    """Returns when every rank has called it."""
    if _several():
        all_max(torch.zeros(1))


def world_size() -> int:
    """The number of ranks, 1 where no group was joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _several() -> bool:
    return world_size() > 1


def _collective_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _reduced(tensor: torch.Tensor, op: Any) -> torch.Tensor:
    result = tensor.detach().clone()
    if not _several():
        return result
    result = result.to(_collective_device())
    dist.all_reduce(result, op=op)
    return result.to(tensor.device)


def _complete_environment(group_exists: bool) -> tuple[str, ...]:
    """Fills in the launcher's variables when there is no launcher; returns the names it had to set."""
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if group_exists:
        known = {"RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size(), "LOCAL_RANK": dist.get_rank(),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}  # fmt: skip
    elif len(missing) == len(LAUNCHER_VARIABLES) or missing == list(LAUNCHER_VARIABLES[:3]):
        for name in FOREIGN_WORLD_SIZES:
            if int(os.environ.get(name) or 1) > 1:
                raise ConfigError(
                    f"{name}={os.environ[name]}, but RANK and WORLD_SIZE are not set: each process would "
                    f"train alone into the same folder; start with deepspeed, torchrun or --num_ranks"
                )
        known = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}  # fmt: skip
    elif missing == ["LOCAL_RANK"] and os.environ["WORLD_SIZE"] == "1":
        known = {"LOCAL_RANK": 0}
    elif missing:
        raise ConfigError(
            f"the environment has {', '.join(n for n in LAUNCHER_VARIABLES if n not in missing)} but not "
            f"{', '.join(missing)}: start with deepspeed, torchrun or --num_ranks, or unset them all"
        )
    for name in missing:
        os.environ[name] = str(known[name])
    return tuple(missing)


def _device(config: Config | None, local_rank: int) -> torch.device:
    chosen = os.environ.get("DS_ACCELERATOR")
    if chosen not in (None, "cuda") or not torch.cuda.is_available():
        # Said out loud because DeepSpeed otherwise warns, in every process, that it found nothing better.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU of its own ({count} visible): start at most "
            f"{count} ranks, or set DS_ACCELERATOR=cpu"
        )
    torch.cuda.set_device(local_rank)
    if config is not None and config.bf16 and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(local_rank)
        raise ConfigError(f"bf16: true, but {name} has no bf16: set bf16: false")
    return torch.device("cuda", local_rank)
