"""An encoder that gives one vector a text, for objectives that compare texts.

Legend: B texts, L positions, D features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from taskmoe.moe.config import ConfigError

POOLINGS = ("model", "mean")


class TextEncoder(nn.Module):
    """The last hidden state of an encoder, pooled, perhaps of length one, times ``scale``.

    With ``scale`` = temperature^(-1/2) the inner product of two vectors is their similarity over the
    temperature.

    Args:
        pooling: ``mean`` over the attended positions, or ``model``: the first position, where BERT and its
            relatives put what stands for the text.
        normalise: make every vector of length one before scaling, so that inner products are cosines.

    Raises:
        ConfigError: an unknown pooling.
    """

    def __init__(self, encoder: nn.Module, pooling: str, normalise: bool, scale: float = 1.0) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling: {pooling!r} is unknown; known are {', '.join(POOLINGS)}")
        self.encoder, self.pooling, self.normalise, self.scale = encoder, pooling, normalise, scale

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> SequenceClassifierOutput:
        """input_ids, attention_mask: [B, L] int64 -> the vectors as ``logits``: [B, D], fp32 or fp64."""
        kwargs.pop("return_dict", None)
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        hidden = hidden.float() if hidden.element_size() < 4 else hidden
        if self.pooling == "mean":
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            vectors = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        else:
            vectors = hidden[:, 0]
        if self.normalise:
            vectors = functional.normalize(vectors, dim=-1)
        return SequenceClassifierOutput(logits=vectors * self.scale)

    @property
    def base_model(self) -> nn.Module:
        return self.encoder

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("encoder"), name)
