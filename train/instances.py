"""What each sequence is about, for routers that read it: embeddings of instances, and their centroids.

Legend: n texts, D embedding, N points, C clusters.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from taskmoe.moe import ConfigError, TaskMoEModel
from taskmoe.moe.choices import choices_in_use
from taskmoe.moe.options import options_of
from taskmoe.train.config import Config
from taskmoe.train.data.bundle import DataBundle, TaskSplit
from taskmoe.train.models import LOAD_ERRORS

COLUMN = "instance"  # of token rows
HASHED = "hashed_words"
HASHED_CELLS = 512  # where nobody says how many
MOST = 50_000  # training instances that centroids are made of: evenly spread over all
STARTS, ROUNDS = 4, 50  # of k-means


def router_options(config: Config) -> Any:
    """The options of a router that reads instances, with ``encoder`` and ``dim``; None: it reads none."""
    router = choices_in_use(config.moe).get("router")
    reads = getattr(router, "reads_instances", None)
    if reads is None:
        return None
    options = options_of("router", config.moe, router)
    return options if reads(options) else None


def with_instances(bundle: DataBundle, config: Config) -> DataBundle:
    """``bundle`` with the embedding of each row's prompt in its token row, where the router reads instances.

    Raises:
        ConfigError: the encoder cannot be read, or gives embeddings of another size.
    """
    options = router_options(config)
    if options is None:
        return bundle
    encoder = InstanceEncoder(options.encoder, options.dim)
    splits = {name: [_embedded(s, encoder) for s in of_tasks] for name, of_tasks in bundle.splits.items()}
    return replace(bundle, splits=splits)


def _embedded(split: TaskSplit, encoder: InstanceEncoder) -> TaskSplit:
    if not len(split.tokens):
        return split
    embeddings_nD = encoder([row["prompt"] for row in split.raw])
    return replace(split, tokens=split.tokens.add_column(COLUMN, embeddings_nD.tolist()))


class InstanceEncoder:
    """Texts -> embeddings of unit length, float32 [n, D].

    Args:
        name: ``hashed_words``, counts of words in D cells; or a Hugging Face encoder by path or name, the
            mean of whose last hidden states is taken over the tokens.
        dim: D; None: what the encoder has, or ``HASHED_CELLS``.
        key: where the two are set, for messages.

    Raises:
        ConfigError: the encoder cannot be read, or has another size.
    """

    def __init__(self, name: str, dim: int | None = None, key: str = "moe.router_options.") -> None:
        self.dim, self.model = dim or HASHED_CELLS, None
        if name == HASHED:
            return
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModel.from_pretrained(name).eval()
        except LOAD_ERRORS as error:
            raise ConfigError(
                f"{key}encoder: {name!r} is not {HASHED}, and no encoder that can be read ({error})"
            ) from error
        size = int(self.model.config.hidden_size)
        if dim is not None and size != dim:
            raise ConfigError(f"{key}dim: {dim}, but {name} has {size}; set it to that")
        self.dim = size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[n, D]; a text without words gives zeros."""
        if self.model is None:
            return nn.functional.normalize(hashed_words(texts, self.dim), dim=1)
        parts = []
        for at in range(0, len(texts), 64):
            batch = self.tokenizer(
                list(texts[at : at + 64]), return_tensors="pt", padding=True, truncation=True, max_length=512
            )
            hidden_nLD = self.model(**batch).last_hidden_state
            mask_nL1 = batch["attention_mask"].unsqueeze(2).to(hidden_nLD.dtype)
            parts.append((hidden_nLD * mask_nL1).sum(1) / mask_nL1.sum(1).clamp_min(1))
        return nn.functional.normalize(torch.cat(parts).float(), dim=1)


def hashed_words(texts: Sequence[str], dim: int) -> Tensor:
    """[n, D] float32: how often the words that fall into each of D cells occur; the same everywhere."""
    counts_nD = torch.zeros(len(texts), dim)
    for i, text in enumerate(texts):
        for word in text.lower().split():
            counts_nD[i, zlib.crc32(word.encode()) % dim] += 1
    return counts_nD


def kmeans(points_ND: Tensor, clusters: int, seed: int, starts: int = STARTS, rounds: int = ROUNDS) -> Tensor:
    """[C, D]: the best of several runs of Lloyd's algorithm from k-means++ starts (Arthur and Vassilvitskii
    2007), by the mean squared distance of points to their centroids.

    A cluster that loses all its points goes to the point that is furthest from its own centroid. With fewer
    different points than clusters, centroids repeat.

    Raises:
        ConfigError: there is no point.
    """
    if not len(points_ND):
        raise ConfigError("centroids need training instances, and there are none")
    generator = torch.Generator().manual_seed(seed)
    points_ND = points_ND.double()
    found = [_lloyd(points_ND, _spread(points_ND, clusters, generator), rounds) for _ in range(starts)]
    return min(found, key=lambda c_CD: float(torch.cdist(points_ND, c_CD).amin(1).square().mean())).float()


def _spread(points_ND: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """[C, D] points, each drawn by its squared distance to those before."""
    centroids_CD = points_ND[torch.randint(len(points_ND), (1,), generator=generator)]
    for _ in range(clusters - 1):
        weights_N = torch.cdist(points_ND, centroids_CD).amin(1).square()
        if not bool(weights_N.any()):
            weights_N = torch.ones_like(weights_N)
        chosen = torch.multinomial(weights_N, 1, generator=generator)
        centroids_CD = torch.cat([centroids_CD, points_ND[chosen]])
    return centroids_CD


def _lloyd(points_ND: Tensor, centroids_CD: Tensor, rounds: int) -> Tensor:
    centroids_CD, owners_N = centroids_CD.clone(), None
    for _ in range(rounds):
        away_N, found_N = torch.cdist(points_ND, centroids_CD).min(1)
        if owners_N is not None and torch.equal(found_N, owners_N):
            break
        owners_N = found_N
        for c in range(len(centroids_CD)):
            mine_N = owners_N == c
            if bool(mine_N.any()):
                centroids_CD[c] = points_ND[mine_N].mean(0)
            else:
                furthest = int(away_N.argmax())
                centroids_CD[c], away_N[furthest] = points_ND[furthest], 0.0
    return centroids_CD


def begin(model: TaskMoEModel, bundle: DataBundle, config: Config) -> None:
    """Give the routers of a new model the centroids of the training instances, where they read instances."""
    if router_options(config) is None:
        return
    from taskmoe.moe.token_routers.clusters import set_centroids

    columns = [split.tokens[COLUMN][:] for split in bundle.splits["train"] if len(split.tokens)]
    points = [point for column in columns for point in column]
    spread = [points[i * len(points) // MOST] for i in range(MOST)] if len(points) > MOST else points
    set_centroids(model, kmeans(torch.tensor(spread), config.moe.num_experts, config.seed))
