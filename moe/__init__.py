"""Task-level mixtures of low-rank experts on any Hugging Face model.

    from taskmoe.moe import TaskMoEConfig, attach

    model = attach(AutoModelForCausalLM.from_pretrained(...), TaskMoEConfig(r=4), tasks=["qa", "sum"])
    out = model(input_ids=ids, task_ids=["qa", "sum"])
"""

from taskmoe.moe.attach import attach
from taskmoe.moe.collapse import CollapseError, collapse, save_lora
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import RowSpaceError, bind
from taskmoe.moe.heads import attach_heads
from taskmoe.moe.model import TaskMoEModel
from taskmoe.moe.regularisation import penalty
from taskmoe.moe.state import StateError, load_adapter
from taskmoe.moe.tasks import Task, TaskError, TaskTable

__all__ = [
    "CollapseError",
    "ConfigError",
    "RowSpaceError",
    "StateError",
    "Task",
    "TaskError",
    "TaskMoEConfig",
    "TaskMoEModel",
    "TaskTable",
    "attach",
    "attach_heads",
    "bind",
    "collapse",
    "load_adapter",
    "penalty",
    "save_lora",
]
