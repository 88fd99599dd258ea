"""Where inputs enter a model: the token embeddings and floating inputs that tie routers into its graph."""

from __future__ import annotations

from torch import nn


def input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The token embeddings of the model and of its parts (encoder, decoder, towers), each once."""
    found: dict[int, nn.Module] = {}
    for owner in model.modules():
        try:
            embedding = owner.get_input_embeddings()  # type: ignore[operator]
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(embedding, nn.Module) and hasattr(embedding, "num_embeddings"):  # perhaps a SavedModule
            found[id(embedding)] = embedding
    return list(found.values())


def floating_inputs(model: nn.Module) -> list[str]:
    """Names of the arguments by which floating inputs may enter the model or its parts (an image tower)."""
    names = ["inputs_embeds", "decoder_inputs_embeds"]
    names += [str(m.main_input_name) for m in model.modules() if hasattr(m, "main_input_name")]
    return list(dict.fromkeys(names))
