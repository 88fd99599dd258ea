"""One task's path as a plain model: equal to one-hot routing, free of wrappers."""

from __future__ import annotations

import pytest
import torch

from taskmoe.moe import ConfigError, TaskError, TaskMoEConfig, attach
from taskmoe.moe.context import _current
from taskmoe.moe.squeeze import squeeze

TASKS = ["a", "b", "c"]


@pytest.mark.parametrize("of", ["layer", "attention", "ffn"])
def test_the_path_of_a_task_is_what_one_hot_gates_compute(kind, of, tiny, batch, shaken, head, close):
    config = TaskMoEConfig(num_experts=3, bank="module", bank_options={"of": of}, gate="one_hot")
    model = shaken(attach(tiny(kind), config, TASKS)).double().eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    for i, task in enumerate(TASKS):
        inputs = batch(kind, [i, i])
        expected = head(model(**inputs))
        plain = squeeze(model, task)
        inputs.pop("task_ids")
        assert _current.get() is None
        close(head(plain(**inputs)), expected, 1e-12)
        fresh = tiny(kind)
        assert type(plain) is type(fresh)
        assert plain.state_dict().keys() == fresh.state_dict().keys()
        assert [type(m) for m in plain.modules()] == [type(m) for m in fresh.modules()]
        assert all(p.requires_grad for p in plain.parameters())
        hooks = [h for m in plain.modules() for h in m._forward_hooks.values()]
        assert not [h for h in hooks if h.__module__.startswith("taskmoe")]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_saved_modules_come_along(tiny, batch, shaken, head, close):
    config = TaskMoEConfig(
        num_experts=3, bank="module", bank_options={"of": "ffn"}, gate="one_hot", modules_to_save=("lm_head",)
    )
    model = shaken(attach(tiny("llama"), config, TASKS)).eval()
    inputs = batch("llama", [1])
    expected = head(model(**inputs))
    close(head(squeeze(model, "b")(input_ids=inputs["input_ids"])), expected)


def test_what_has_no_path_is_refused(tiny):
    with pytest.raises(ConfigError, match="bank is no copy of a module"):
        squeeze(attach(tiny("llama"), TaskMoEConfig(), TASKS), "a")
    token = TaskMoEConfig(bank="module", bank_options={"of": "ffn"}, router="token_linear")
    with pytest.raises(ConfigError, match="tokens are routed one by one"):
        squeeze(attach(tiny("llama"), token, TASKS), "a")
    with pytest.raises(TaskError, match="unknown task 'd'"):
        squeeze(attach(tiny("llama"), TaskMoEConfig(bank="module"), TASKS), "d")
