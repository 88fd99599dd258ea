"""The methods of selection by name."""

from __future__ import annotations

from taskmoe.train.selection import (
    consistency_diversity,
    datamap,
    divergence,
    gradient,
    random_order,
    routing,
    semb,
    size,
    taskemb,
    textemb,
)
from taskmoe.train.selection.base import Method

TEXTS = ("rows", "answers")
EMBEDDINGS = (*TEXTS, "encoder")

METHODS: dict[str, Method] = {
    "semb": Method(semb.affinity, options=EMBEDDINGS),
    "textemb": Method(textemb.affinity, options=TEXTS),
    "taskemb": Method(taskemb.affinity, options=("rows",)),
    "divergence": Method(divergence.affinity, options=(*EMBEDDINGS, "measure")),
    "consistency_diversity": Method(consistency_diversity.affinity, symmetric=False, options=EMBEDDINGS),
    "gradient": Method(gradient.affinity, options=("rows",)),
    "routing": Method(routing.affinity, reads_rows=False),
    "datamap": Method(datamap.affinity, options=("rows",)),
    "size": Method(size.affinity, symmetric=False),
    "random": Method(random_order.affinity, symmetric=False, reads_rows=False),
}
