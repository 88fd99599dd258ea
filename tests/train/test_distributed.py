"""Joining and leaving a group, with and without a launcher; what ranks tell each other."""

import logging
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from taskmoe.moe.config import ConfigError
from taskmoe.train import distributed


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (*distributed.LAUNCHER_VARIABLES, *distributed.FOREIGN_WORLD_SIZES):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_without_a_launcher_again_and_again(no_launcher):
    for _ in range(3):
        ranks = distributed.init()
        try:
            assert (ranks.rank, ranks.world_size, ranks.local_rank) == (0, 1, 0)
            assert ranks.is_main and ranks.owns_group and ranks.device.type in ("cpu", "cuda")
            assert torch.distributed.is_initialized()
            assert distributed.gather_objects("x") == ["x"]
            assert distributed.broadcast_object({"a": 1}) == {"a": 1}
            assert distributed.exchange_failures("", 1.0) == {}
            assert distributed.exchange_failures("full", 1.0) == {0: "full"}
        finally:
            distributed.shutdown(ranks)
        assert not torch.distributed.is_initialized()
        assert not any(name in os.environ for name in distributed.LAUNCHER_VARIABLES)


def test_helpers_need_no_group():
    x = torch.tensor([1.5, -2.0])
    total = distributed.all_sum(x)
    assert torch.equal(total, x) and total.data_ptr() != x.data_ptr()
    assert distributed.gather_objects(3) == [3]
    distributed.barrier()


def test_a_group_of_others_is_joined_and_left_alone(no_launcher):
    owner = distributed.init()
    try:
        guest = distributed.init()
        assert not guest.owns_group
        distributed.shutdown(guest)
        assert torch.distributed.is_initialized()
    finally:
        distributed.shutdown(owner)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4, but RANK"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "each process would train alone"),
    ],
)
def test_an_incomplete_environment_is_an_error(no_launcher, variables, message):
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        distributed.init()
    assert not torch.distributed.is_initialized()


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="rank 1 of this machine has no GPU"):
        distributed._device(None, 1)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert distributed._device(None, 1) == torch.device("cpu")


def talk(x):
    rank = torch.distributed.get_rank()
    return {
        "ranks": distributed.init(),
        "sum": distributed.all_sum(torch.tensor([[x, float(rank)]], dtype=torch.float64)),
        "max": distributed.all_max(torch.tensor([rank, -rank])),
        "gathered": distributed.gather_objects({"rank": rank}),
        "told": distributed.broadcast_object(("from", rank)),
        "failures": [distributed.exchange_failures("" if rank else f"é {i}", 1.0) for i in range(4)],
    }


def test_two_ranks(spawn_ranks):
    replies = spawn_ranks(talk, x=0.25)
    for rank, reply in enumerate(replies):
        assert (reply["ranks"].rank, reply["ranks"].world_size) == (rank, 2)
        assert reply["sum"].tolist() == [[0.5, 1.0]] and reply["sum"].dtype == torch.float64
        assert reply["max"].tolist() == [1, 0]
        assert reply["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert reply["told"] == ("from", 0)
        assert reply["failures"] == [{0: f"é {i}"} for i in range(4)]


def train_toy(stage):
    """One engine's life: made, three steps, destroyed; returns the weights."""
    import deepspeed

    ranks = distributed.init()
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(ranks.rank)
    for _ in range(3):
        loss = engine(torch.randn(2, 4, generator=generator)).pow(2).mean()
        engine.backward(loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        weights = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
    engine.destroy()
    return weights


def test_engines_live_one_after_another_in_the_shared_pair(spawn_ranks):
    """What all two-rank tests rest on: no stage leaves anything behind that changes the next one."""
    weights = [spawn_ranks(train_toy, stage=stage) for stage in (3, 0, 1, 2, 3)]
    for pair in weights:
        assert torch.equal(pair[0], pair[1])
        torch.testing.assert_close(pair[0], weights[0][0], rtol=0, atol=1e-6)
    assert torch.equal(weights[0][0], weights[-1][0])


def leave():
    distributed.shutdown()
    return torch.distributed.is_initialized()


def fail(rank):
    if torch.distributed.get_rank() == rank:
        raise RuntimeError("on purpose")
    distributed.barrier()


def test_the_pair_makes_a_new_group_after_a_function_that_left_it(spawn_ranks):
    assert spawn_ranks(leave) == [False, False]
    assert spawn_ranks(talk, x=0.0)[1]["told"] == ("from", 0)


@pytest.mark.slow
def test_the_pair_starts_anew_after_a_failure(spawn_ranks, tmp_path):
    pair = type(spawn_ranks)(tmp_path)
    try:
        with pytest.raises(AssertionError, match="on purpose"):
            pair(fail, rank=1)
        assert pair(talk, x=0.0)[1]["told"] == ("from", 0)
        assert pair.starts == 2
    finally:
        pair.close()


def test_start_compiles_nothing_and_leaves_nothing(no_launcher, tmp_path):
    """In a fresh process, where nothing is imported yet. A buffer that appears all the same is swept."""
    program = """
        import os, pathlib, deepspeed
        from taskmoe.train import distributed
        ranks = distributed.init()
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{os.environ['MASTER_PORT']}_0"
        if os.path.isdir("/dev/shm"):
            pathlib.Path("/dev/shm", name).touch()
        assert deepspeed.comm.comm.cdb.shm_comm_op is None
        deepspeed.utils.logger.warning("a warning")
        deepspeed.utils.logger.info("chatter")
        distributed.shutdown(ranks)
        assert not os.path.exists("/dev/shm/" + name)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "built").exists()
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "a warning" in lines[0]


def test_only_buffers_of_this_port_are_swept(tmp_path):
    mine = tmp_path / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29501_0"
    others = [
        tmp_path / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29502_0",
        tmp_path / f"deepspeed_allreduce_buffer_{os.getuid() + 1}_127.0.0.1_29501_0",
    ]
    for path in (mine, *others):
        path.touch()
    assert distributed.remove_shared_memory(29501, str(tmp_path)) == [str(mine)]
    assert not mine.exists() and all(path.exists() for path in others)


def test_other_ranks_are_quieter(no_launcher):
    import deepspeed
    import transformers

    before = deepspeed.utils.logger.level, transformers.utils.logging.get_verbosity()
    try:
        distributed.quieten(1)
        assert deepspeed.utils.logger.level == logging.ERROR
        assert transformers.utils.logging.get_verbosity() == logging.ERROR
    finally:
        distributed.quieten(0)
        transformers.utils.logging.enable_progress_bar()
        assert before[0] in (logging.WARNING, deepspeed.utils.logger.level)
