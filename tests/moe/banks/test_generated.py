"""Generated adapters against the formulas, written out for one task behind the blocks of a plain model."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from taskmoe.moe import ConfigError, TaskMoEConfig, TaskMoEModel, TaskTable, attach
from taskmoe.moe.banks.generated import Projector
from taskmoe.moe.sub_blocks import BlockOutput

NAMES = ["sort", "sum", "translate"]
VARIANTS = {
    "plus plus": {},
    "one set for all": {"share": "model"},
    "a set a block": {"share": "block"},
    "no norm": {"norm": False},
    "ffn, a set a block, no norm": {"share": "block", "norm": False, "behind": "ffn", "nonlinearity": "relu"},
}


def built(model, options, **settings):
    settings = {"task_embedding_dim": 5, "bank_options": {"hidden": 7, "dim": 6, **options}, **settings}
    config = TaskMoEConfig(bank="generated", r=3, **settings)
    return attach(model, config, NAMES)


def generated(model, task, name, options, layers, places):
    """The adapter of one task behind block ``name``: down, bias, up, bias, norm."""
    t, hyper = model.routing.representation.embedding_TD[task], model.hyper
    layer, _, _ = name.partition(".self_attn" if ".self_attn" in name else ".mlp")
    share = options.get("share", "stack")
    if share == "block":
        x, projector, key = t, "all", name.replace(".", "-")
    else:
        place = places[name.endswith("down_proj")]
        x = torch.cat([t, hyper.places.layer_LD[layers.index(layer)], hyper.places.place_PD[place]])
        projector = "model-layers" if share == "stack" else "model"
        key = f"{projector}-16"
    p, g = hyper.projectors[projector], hyper.generators[key]

    def linear(x, module):
        return sum(x[i] * module.weight_IO[i] for i in range(len(x))) + module.bias_O

    x = linear(linear(x, p.first).clamp(min=0), p.second)
    x = (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt() * p.scale_I + p.shift_I
    up = linear(x, g.up).view(4, 16)
    norm = linear(x, g.norm).view(2, 16) if options.get("norm", True) else None
    return linear(x, g.down).view(3, 16), linear(x, g.bias), up[:3], up[3], norm


def written_out(plain, model, task, options):
    places = [0, 0] if options.get("behind") == "ffn" else [0, 1]

    def hook(weights):
        def add(module, args, y):
            down, bias, up, shift, norm = weights
            hidden = y @ down.T + bias
            if options.get("nonlinearity") == "relu":
                hidden = hidden.clamp(min=0)
            else:
                hidden = functional.gelu(hidden, approximate="tanh")
            z = hidden @ up + shift
            if norm is not None:
                mean, var = z.mean(-1, keepdim=True), z.var(-1, keepdim=True, unbiased=False)
                z = (z - mean) / (var + 1e-6).sqrt() * norm[0] + norm[1]
            return y + z

        return add

    layers = ["model.layers.0", "model.layers.1"]
    for name, module in model.base_model.named_modules():
        if isinstance(module, BlockOutput):
            weights = generated(model, task, name, options, layers, places)
            plain.get_submodule(name).register_forward_hook(hook(weights))
    return plain


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_formulas(variant, tiny, batch, shaken, head, gradients, close):
    options = VARIANTS[variant]
    model = shaken(built(tiny("llama"), options)).double().eval()
    inputs = batch("llama", [2, 0, 1])
    out = head(model(**inputs))
    weights = torch.randn(out.shape, dtype=torch.float64)
    found = gradients(model, (out * weights).sum())
    expected = []
    for i, task in enumerate(inputs.pop("task_ids").tolist()):
        plain = written_out(tiny("llama").double().eval(), model, task, options)
        expected.append(head(plain(**{n: v[i : i + 1] for n, v in inputs.items()})))
    expected = torch.cat(expected)
    close(out, expected, 1e-12)
    close(found, gradients(model, (expected * weights).sum()), 1e-12)


def test_runs_on_every_architecture(kind, tiny, batch, shaken, head, gradients, close):
    model = shaken(built(tiny(kind), {})).double().eval()
    inputs = batch(kind, [2, 0, 1, 0])
    together = head(model(**inputs))
    for i in range(4):
        close(head(model(**{n: v[i : i + 1] for n, v in inputs.items()})), together[i : i + 1], 1e-12)
    gradients(model, together.square().sum())  # all of it gets one


def test_encoder_and_decoder_have_generators_of_their_own(tiny):
    model = built(tiny("t5"), {})
    assert set(model.hyper.projectors) == {"encoder-block", "decoder-block"}
    assert model.hyper.places.layer_LD.shape == (4, 5) and model.hyper.places.place_PD.shape == (3, 5)


@pytest.mark.parametrize("norm", [True, False])
def test_the_start(norm, tiny, batch, head):
    inputs = batch("llama", [2, 0, 1])
    tasks = inputs.pop("task_ids")
    expected = head(tiny("llama")(**inputs))
    options = {"norm": norm, "hidden": 32, "dim": 32}
    assert torch.equal(head(built(tiny("llama"), options)(**inputs, task_ids=tasks)), expected)
    model = built(tiny("llama"), {**options, "start": "normal"})
    for module in model.hyper.generators.modules():
        if hasattr(module, "weight_IO"):
            assert 0.008 < float(module.weight_IO.detach().std()) < 0.012 and not module.bias_O.any()
    assert not torch.equal(head(model(**inputs, task_ids=tasks)), expected)


def test_generators_run_once_a_task(tiny, batch, shaken):
    model, seen = shaken(built(tiny("llama"), {})), []
    for module in model.modules():
        if isinstance(module, Projector):
            module.first.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model(**batch("llama", [2, 0, 2, 2, 0]))
    assert seen == [(2, 15)] * 4  # of each block: two tasks, three vectors of 5


def test_a_new_task_fits_its_vector_only(tiny, batch, shaken, head, tmp_path):
    model = shaken(built(tiny("llama"), {})).eval()
    model.save_pretrained(tmp_path)
    table = TaskTable.from_names([*NAMES, "copy"])
    grown = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path, table).eval()
    old = model.routing.representation.embedding_TD
    new = grown.routing.representation.embedding_TD
    assert torch.equal(new[:3], old) and torch.allclose(new[3], old.mean(0))
    assert grown.set_trainable(["task_embedding"]) == ["routing.representation.embedding_TD"]
    known, inputs = batch("llama", [2, 0, 1]), batch("llama", [3, 3, 3])
    before = head(grown(**known))
    losses = []
    optimizer = torch.optim.SGD([new], lr=0.02)
    for _ in range(5):
        loss = functional.cross_entropy(head(grown(**inputs)).flatten(0, 1), inputs["input_ids"].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert not new.grad[:3].any() and new.grad[3].any()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(head(grown(**known)), before)


def test_what_trains(tiny):
    model = built(tiny("llama"), {})
    groups = model.trainable_groups()
    assert all(n.startswith("hyper.") for n, _ in groups["experts"]) and groups["experts"]
    assert [n for n, _ in groups["task_embedding"]] == ["routing.representation.embedding_TD"]
    assert not groups["base"] and not groups["router"]
    names = model.trainable_names()
    assert len(names) == len(set(names)) == sum(len(ps) for ps in groups.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "layer"}, "share: 'layer' is unknown; known are model, stack, block"),
        ({"start": "one"}, "start: 'one' is unknown; known are zero, normal"),
        ({"dim": 0}, "dim: 0 must be at least 1"),
        ({"init_std": 0.0}, "init_std: 0.0 must be above 0"),
        ({"nonlinearity": "tanh"}, "nonlinearity: 'tanh' is unknown"),
    ],
)
def test_wrong_settings_are_errors(options, message, tiny):
    with pytest.raises(ConfigError, match=rf"moe.bank_options.{message}"):
        built(tiny("llama"), options)


def test_vectors_from_a_file(tiny, batch, shaken, head, gradients, close, tmp_path):
    vectors = {name: [float(i), 1.0 - i, 0.5] for i, name in enumerate(NAMES)}
    path = tmp_path / "vectors.json"
    path.write_text(json.dumps(vectors))
    settings = {"representation": "frozen", "representation_options": {"path": str(path)}}
    config = TaskMoEConfig(bank="generated", r=3, bank_options={"hidden": 7, "dim": 6}, **settings)
    model = shaken(attach(tiny("llama"), config, NAMES)).double().eval()
    assert not model.trainable_groups()["task_embedding"]
    learned = built(tiny("llama"), {}, task_embedding_dim=3).double().eval()
    state = {n: p for n, p in model.named_parameters() if n.startswith("hyper.")}
    with torch.no_grad():
        for name, p in learned.named_parameters():
            if name in state:
                p.copy_(state[name])
        learned.routing.representation.embedding_TD.copy_(torch.tensor(list(vectors.values())))
    inputs = batch("llama", [2, 0, 1])
    close(head(model(**inputs)), head(learned(**inputs)), 1e-12)
    gradients(model, head(model(**inputs)).square().sum())  # all that trains gets one
    model.save_pretrained(tmp_path / "saved")
    path.unlink()
    again = TaskMoEModel.from_pretrained(tiny("llama"), tmp_path / "saved").double().eval()
    assert torch.equal(head(again(**inputs)), head(model(**inputs)))
