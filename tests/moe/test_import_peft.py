"""LoRAs that peft trained and saved: each gives what peft gives, and mixtures what their weights say."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from taskmoe.moe import ConfigError, TaskMoEConfig, TaskMoEModel, attach
from taskmoe.moe.import_peft import import_peft

peft = pytest.importorskip("peft")

# Other ranks, scales and targets each; the second scales by alpha / sqrt(r), the third one module by itself.
LORAS = {
    "sort": {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]},
    "sum": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "copy": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 5},
             "alpha_pattern": {"o_proj": 2}},
}  # fmt: skip


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own


@pytest.fixture
def saved(tiny, tmp_path):
    """Settings of LoRAs, kind -> their folders; A and B random."""

    def save(loras=LORAS, kind="llama"):
        for name, settings in loras.items():
            config = peft.LoraConfig(init_lora_weights=False, **settings)
            peft.get_peft_model(tiny(kind), config).save_pretrained(tmp_path / name)
        return [tmp_path / name for name in loras]

    return save


def of_peft(tiny, folder, kind="llama"):
    return peft.PeftModel.from_pretrained(tiny(kind), folder).eval()


def ids(rows):
    return torch.randint(4, 61, (rows, 7), generator=torch.Generator().manual_seed(0))


def test_each_lora_is_pefts(saved, tiny, close):
    folders = saved()
    model = import_peft(tiny("llama"), folders).eval()
    assert model.tasks.names == list(LORAS) and not model.trainable_names()
    inputs = ids(4)
    with torch.no_grad():
        out = model(input_ids=inputs, task_ids=["sum", "sort", "copy", "sum"]).logits
        for i, name in enumerate(("sum", "sort", "copy", "sum")):
            theirs = of_peft(tiny, folders[list(LORAS).index(name)])(input_ids=inputs[i : i + 1]).logits
            close(out[i : i + 1], theirs)


def test_a_folder_or_a_pattern_names_them_in_order(saved, tiny, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "list.txt").touch()
    folders = sorted(saved())
    found = {}
    for adapters, number in ((tuple(map(str, folders)), 3), (str(tmp_path), 3), (f"{tmp_path}/s*", 2),
                             (str(folders[0]), 1)):  # fmt: skip
        config = TaskMoEConfig(bank="imported", bank_options={"adapters": adapters}, num_experts=number)
        found[adapters] = attach(tiny("llama"), config, ["x"]).adapter_state_dict()
    listed, inside, some, one = found.values()
    assert listed.keys() == inside.keys() and all(torch.equal(inside[n], t) for n, t in listed.items())
    name = next(n for n in listed if n.endswith("q_proj.bank.B_ErN"))
    assert [p.name for p in folders] == ["copy", "sort", "sum"]
    assert torch.equal(some[name], listed[name][1:, :4]) and len(one[name]) == 1


def test_no_adapters_there_are_one_line_that_says_who_makes_them(tiny, tmp_path):
    for adapters, what in ((f"{tmp_path}/gone", "is missing"), (str(tmp_path), "holds no adapters"),
                           (f"{tmp_path}/*", "is missing")):  # fmt: skip
        config = TaskMoEConfig(bank="imported", bank_options={"adapters": adapters}, num_experts=3)
        with pytest.raises(ConfigError, match=rf"adapters: .* {what}; an adapter .* made by peft's save_pre"):
            attach(tiny("llama"), config, ["x"])


def test_some_of_the_loras_as_tasks(saved, tiny):
    folders = saved()
    model = import_peft(tiny("llama"), folders, tasks=["copy", "sort"])
    assert model.routing.router.route_TE.argmax(-1).tolist() == [2, 0]
    with pytest.raises(ConfigError, match="'sort' matches no task; the nearest of 1 is 'other'"):
        import_peft(tiny("llama"), folders, tasks=["other"])


def test_conv1d_too(saved, tiny, close):
    folders = saved({"a": {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}}, "gpt2")
    model = import_peft(tiny("gpt2"), folders).eval()
    with torch.no_grad():
        out = model(input_ids=ids(1), task_ids=["a"]).logits
        close(out, of_peft(tiny, folders[0], "gpt2")(input_ids=ids(1)).logits)


def test_a_mixture_by_a_router_is_pefts_weighted_sum(saved, tiny, close):
    """peft's concatenation of adapters with weights is sum_e w_e dW_e exactly."""
    targets = ["q_proj", "v_proj"]
    folders = saved({n: {**s, "target_modules": targets} for n, s in LORAS.items() if n != "copy"})
    config = TaskMoEConfig(router="task_table", gate="softmax", router_scope="model")
    model = import_peft(tiny("llama"), folders, config, ["target"]).eval()
    weights = [0.3, 0.7]
    with torch.no_grad():
        model.routing.router.logits_STHE.copy_(torch.tensor(weights).log())
    theirs = of_peft(tiny, folders[0])
    theirs.load_adapter(folders[1], "second")
    theirs.add_weighted_adapter(["default", "second"], weights, "mixed", combination_type="cat")
    theirs.set_adapter("mixed")
    with torch.no_grad():
        out = model(input_ids=ids(2), task_ids=["target", "target"]).logits
        close(out, theirs.eval()(input_ids=ids(2)).logits)


def test_the_router_trains_and_the_experts_do_not(saved, tiny):
    folders = saved()
    config = TaskMoEConfig(router="task_table", gate="softmax")
    model = import_peft(tiny("llama"), folders, config, ["x", "y"]).train()
    assert model.trainable_names() == ["routing.router.logits_STHE"]
    model.set_trainable(("experts", "router"))
    assert model.trainable_names() == ["routing.router.logits_STHE"]
    model(input_ids=ids(2), labels=ids(2), task_ids=["x", "y"]).loss.backward()
    assert model.routing.router.logits_STHE.grad.any()
    going_on = import_peft(tiny("llama"), folders, config, ["x"], train=True)
    assert len(going_on.trainable_names()) > 1


def test_a_saved_import_needs_the_folders_no_more(saved, tiny, tmp_path):
    folders = saved()
    model = import_peft(tiny("llama"), folders, TaskMoEConfig(), ["x", "y"]).eval()
    model.save_pretrained(tmp_path / "whole")
    for folder in folders:
        for file in folder.iterdir():
            file.unlink()
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "whole").eval()
    with torch.no_grad():
        found, expected = (m(input_ids=ids(2), task_ids=["x", "y"]).logits for m in (again, model))
    assert torch.equal(found, expected)
    again.save_pretrained(tmp_path / "again")
    twice = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "again")
    for loaded in (again, twice):
        assert loaded.trainable_names() == ["routing.router.logits_STHE"], "experts stay as they were trained"
        loaded.set_trainable(("experts", "router"))
        assert loaded.trainable_names() == ["routing.router.logits_STHE"]


def test_an_import_that_trains_goes_on_training_once_loaded(saved, tiny, tmp_path):
    model = import_peft(tiny("llama"), saved(), TaskMoEConfig(), ["x", "y"], train=True)
    model.save_pretrained(tmp_path / "whole")
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "whole")
    assert again.trainable_names() == model.trainable_names()
    assert any("bank" in name for name in again.trainable_names())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "holds a IA3, not a LORA"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"alora_invocation_tokens": [5, 7]}, "alora_invocation_tokens is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base too"),
    ],
)
def test_adapters_that_are_more_than_a_lora_are_refused(change, message, saved, tiny):
    folders = saved()
    path = folders[0] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=f"moe.bank_options.adapters: .*sort.*{message}"):
        import_peft(tiny("llama"), folders)


def test_files_that_do_not_fit_are_errors(saved, tiny, tmp_path):
    folders = saved()
    with pytest.raises(ConfigError, match=r"which GPT2LMHeadModel lacks"):
        import_peft(tiny("gpt2"), folders)
    with pytest.raises(ConfigError, match="not a readable adapter config"):
        import_peft(tiny("llama"), [tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"moe\.bank_options\.adapters: is empty"):
        import_peft(tiny("llama"), [], TaskMoEConfig(), ["x"])
    path = folders[0] / "adapter_model.safetensors"
    state = load_file(path)
    save_file({n: t[:, :3].clone() for n, t in state.items()}, path)
    with pytest.raises(ConfigError, match=r"down_proj is 3 x 16, and 24 x 16 in the model"):
        import_peft(tiny("llama"), folders)
    save_file({**state, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ConfigError, match=r"lm_head.weight is neither A nor B"):
        import_peft(tiny("llama"), folders)


def test_a_run_says_how_many_experts_there_are(saved, tiny):
    options = {"adapters": [str(f) for f in saved()]}
    config = TaskMoEConfig(bank="imported", bank_options=options, num_experts=2)
    with pytest.raises(ConfigError, match=r"moe\.num_experts: 2, but moe\.bank_options\.adapters names 3"):
        attach(tiny("llama"), config, ["x"])
