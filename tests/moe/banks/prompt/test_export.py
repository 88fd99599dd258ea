"""peft reads a task's prompt, and its model gives what ours gives."""

from __future__ import annotations

import pytest
import torch
from transformers import BertForSequenceClassification

from taskmoe.moe import TaskError, TaskMoEConfig, attach
from taskmoe.moe.banks.prompt.export import save_prompt
from taskmoe.moe.collapse import CollapseError, collapse

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own
PLACES = [("llama", "input"), ("gpt2", "input"), ("t5", "input"), ("llama", "layers"), ("gpt2", "layers")]


@pytest.mark.parametrize(("kind", "where"), PLACES)
@torch.no_grad()
def test_peft_gives_the_same(kind, where, bank, prompted, tiny, batch, close, tmp_path):
    model = prompted(kind, bank, where=where).float()
    for task, name in enumerate(("sort", "sum")):
        save_prompt(model, name, tmp_path / name)
        theirs = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / name).eval()
        inputs = batch(kind, [task] * 3)
        found = model(**inputs).logits
        inputs.pop("task_ids")
        expected = theirs(**inputs).logits
        close(expected if kind == "t5" or where == "layers" else expected[:, 3:], found)


@torch.no_grad()
def test_peft_generates_the_same(prompted, tiny, batch, tmp_path):
    model = prompted("llama", "multitask_prompt").float()
    save_prompt(model, 1, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    inputs = batch("llama", [1, 1])
    settings = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(**inputs, **settings)
    inputs.pop("task_ids")
    assert torch.equal(theirs.generate(**inputs, **settings)[:, -5:], found[:, -5:])


def test_what_is_no_prompt_of_a_generator_is_refused(prompted, tiny, tmp_path):
    lora = attach(tiny("llama"), TaskMoEConfig(r=2, num_experts=2), ["a"])
    with pytest.raises(CollapseError, match="'low_rank' is no prompt"):
        save_prompt(lora, "a", tmp_path)
    bert = BertForSequenceClassification(tiny("bert").config)
    with pytest.raises(CollapseError, match="BertForSequenceClassification: peft's models"):
        save_prompt(prompted("bert", "prompt", base=bert), "sort", tmp_path)
    saved = attach(tiny("llama"), TaskMoEConfig(bank="prompt", modules_to_save=("norm",)), ["a"])
    with pytest.raises(CollapseError, match="trained whole beside the prompts"):
        save_prompt(saved, "a", tmp_path)
    with pytest.raises(TaskError, match="unknown task 'song'"):
        save_prompt(prompted("llama", "prompt"), "song", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_prompt_is_no_lora(prompted):
    with pytest.raises(CollapseError, match="'prompt' is no product of two factors"):
        collapse(prompted("llama", "prompt"), 0)
