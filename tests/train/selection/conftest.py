"""Six tiny tasks, three pairs of twins in words and answers, and a run of them with three checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from taskmoe.train.config_io import load
from taskmoe.train.loop import train

CONFIG = """\
model: {{type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2}}
tokenizer: {{kind: wordlevel, vocab_size: 64}}
moe: {{r: 2, num_experts: 3}}
data: {{root: {home}/data, max_length: 16, cache_dir: {home}/cache}}
mixing: {{strategy: equal}}
output_dir: {home}/run
max_steps: 6
save_steps: 2
save_total_limit: 9
per_device_train_batch_size: 12
learning_rate: 0.02
phases: [{{train: [base, experts, router]}}]
report_to: []
"""
WORDS = {"red": "yes", "blue": "no", "green": "perhaps"}


def write_task(root: Path, name: str, word: str, rows: int, first: int) -> None:
    (root / name).mkdir(parents=True)
    lines = [
        json.dumps({"input": f"{word} w{(first + i) % 5}", "output": f"{WORDS[word]} {word}"}) + "\n"
        for i in range(rows)
    ]
    for split in ("train", "validation"):
        (root / name / f"{split}.jsonl").write_text("".join(lines))


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks red-a, red-b, blue-a, ... in a folder; -b have more rows than -a, and begin with other ones."""
    home = tmp_path_factory.mktemp("selection")
    for word in WORDS:
        write_task(home / "data", f"{word}-a", word, 8, 0)
        write_task(home / "data", f"{word}-b", word, 10, 2)
    path = home / "config.yaml"
    path.write_text(CONFIG.format(home=home))
    return path


@pytest.fixture(scope="session")
def run(config_file: Path) -> Path:
    """The folder of a run of six steps, with checkpoints 2, 4 and 6."""
    config = load(config_file)
    assert train(config) == 0
    return Path(config.output_dir)
