"""What every test shares: no network, no wandb service, no trace outside tmp_path."""

from __future__ import annotations

import os

# Before anything imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ["WANDB_MODE"] = "disabled"  # tests of the wandb log set it themselves
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
