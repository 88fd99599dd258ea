"""What a run tells of its routing: the numbers of its own gates, the same after a stop, and at no price."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from taskmoe.moe import TaskMoEConfig, TaskTable, attach
from taskmoe.moe.snapshot import FILE, SUMS, Snapshot
from taskmoe.train.config import (
    Config,
    DataConfig,
    MixingConfig,
    PhaseConfig,
    SkillGymConfig,
    TokenizerConfig,
    TrackConfig,
)
from taskmoe.train.distributed import Ranks
from taskmoe.train.following import Following
from taskmoe.train.loop import train
from taskmoe.train.meter import Meter
from taskmoe.train.track.facts import FIRST
from taskmoe.train.track.log import JsonlLog, read_log
from taskmoe.train.track.routing import group_keys, metrics
from taskmoe.train.track.tracker import LOG_NAME

TASK = TaskMoEConfig(r=2, num_experts=3, router_init_std=0.5)
TOKEN = TaskMoEConfig(r=2, num_experts=3, router="token_linear", lora_dropout=0.2)
GYM = {"num_tasks": 3, "num_skills": 4, "train_rows": 48, "validation_rows": 4, "test_rows": 4}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
BASE = Config(
    model={"type": "llama", **SIZES, "num_key_value_heads": 2},
    tokenizer=TokenizerConfig(kind="wordlevel", vocab_size=32),
    data=DataConfig(skill_gym=SkillGymConfig(**GYM, alphabet_size=8, max_string_length=4), max_length=16),
    mixing=MixingConfig(strategy="equal"),
    max_steps=12,
    per_device_train_batch_size=6,
    learning_rate=1e-2,
    phases=(PhaseConfig(train=("base", "experts", "router")),),
    logging_steps=4,
    save_steps=4,
    save_total_limit=0,
    report_to=(),
    track=TrackConfig(report=False),
)  # fmt: skip


def lines(run, kind):
    return [line for line in read_log(run / "trainer_log.jsonl") if line["kind"] == kind]


def weights(run):
    return load_file(run / "checkpoint-12" / "adapter_model.safetensors")


@pytest.mark.parametrize("moe", [TASK, TOKEN], ids=["task", "token"])
def test_the_numbers_are_those_of_the_saved_gates(tmp_path, moe):
    run = tmp_path / "run"
    track = replace(BASE.track, media_steps=8)
    assert train(replace(BASE, moe=moe, output_dir=str(run), track=track)) == 0
    first, last = Snapshot.load(run / FIRST), Snapshot.load(run / "checkpoint-12" / FILE)
    assert last.level == ("task" if moe is TASK else "token") and not any(
        g.isnan().any() for g in last.gates.values()
    )
    told = lines(run, "train")[-1]
    for key, value in metrics(last, first).items():
        assert told[key] == pytest.approx(value, abs=1e-9), key
    assert told["routing/drift"] > 0
    assert [line["step"] for line in lines(run, "routing")] == [8, 12]
    whole = lines(run, "routing")[-1]
    assert {k: v for k, v in whole.items() if k.startswith("routing/")} == pytest.approx(
        group_keys(last, first), nan_ok=True
    )


@pytest.mark.parametrize("stop", [4, 8])
def test_what_tokens_chose_goes_on_after_a_stop(tmp_path, stop, monkeypatch):
    two = (PhaseConfig(steps=6), PhaseConfig(train=("experts", "router")))  # counts are carried on
    whole = replace(BASE, moe=TOKEN, phases=two, output_dir=str(tmp_path / "whole"))
    assert train(whole) == 0
    part = replace(whole, output_dir=str(tmp_path / "part"))
    from taskmoe.train.loop import Run

    with monkeypatch.context() as patch:
        save = Run._save

        def saves_and_dies(self):
            save(self)
            if self.step == stop:
                raise KeyboardInterrupt

        patch.setattr(Run, "_save", saves_and_dies)
        with pytest.raises(KeyboardInterrupt):
            train(part)
    assert train(replace(part, resume_from_checkpoint="true")) == 0
    a, b = (load_file(tmp_path / run / "checkpoint-12" / SUMS) for run in ("whole", "part"))
    assert all(torch.equal(a[n], b[n]) for n in a) and a.keys() == b.keys()
    for kind in ("train", "routing"):
        one, other = (lines(tmp_path / run, kind) for run in ("whole", "part"))
        assert [{**line, "time": 0} for line in one] == [{**line, "time": 0} for line in other]


def test_following_changes_nothing(tmp_path):
    plain = replace(BASE, moe=TOKEN, output_dir=str(tmp_path / "plain"), logging_steps=12)
    track = TrackConfig(report=True, media_steps=1)
    followed = replace(plain, output_dir=str(tmp_path / "followed"), logging_steps=1, track=track)
    assert train(plain) == train(followed) == 0
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "followed")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert not (tmp_path / "plain" / "report.html").exists()
    assert (tmp_path / "followed" / "report.html").stat().st_size > 10_000


def test_a_resumed_run_knows_who_fought(tmp_path):
    log = JsonlLog(tmp_path / LOG_NAME)
    for step, cosine in ((4, -0.5), (8, 0.5)):
        log.write(
            step, "train", {"grad/rows": [["a"], ["b"]], "grad/cosine_matrix": [[1, cosine], [cosine, 1]]}
        )
    log.close()
    tasks, alone = TaskTable.from_names(["a", "b"]), Ranks(0, 1, 0, torch.device("cpu"))
    following = Following(BASE, tmp_path, alone, tasks, Meter(tasks, [1, 1]), {"step": 4})
    shown = []
    following.tracker.log_media = lambda step, media: shown.append(media.conflict)
    model = attach(LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=8)), TASK, tasks)
    following.show(5, model, None)
    following.close("interrupted")
    assert shown == [([["a"], ["b"]], [[1.0, -0.5], [-0.5, 1.0]])]


def run_one(config):
    """On a rank of the shared pair."""
    torch.set_num_threads(1)
    return train(config)


def test_ranks_add_up_what_their_tokens_chose(spawn_ranks, tmp_path):
    moe = replace(TOKEN, lora_dropout=0.0)
    alone = replace(BASE, moe=moe, output_dir=str(tmp_path / "one"), gradient_accumulation_steps=2)
    assert train(alone) == 0
    pair = replace(BASE, moe=moe, output_dir=str(tmp_path / "two"))
    assert spawn_ranks(run_one, config=pair) == [0, 0]
    one, two = (load_file(tmp_path / run / "checkpoint-12" / SUMS) for run in ("one", "two"))
    for name, sums in one.items():
        torch.testing.assert_close(two[name], sums, rtol=1e-4, atol=1e-4)
