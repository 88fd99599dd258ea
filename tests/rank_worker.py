"""One rank of the pair that conftest.py's `spawn_ranks` keeps: runs the functions it is sent, in order."""

from __future__ import annotations

import gc
import importlib.util
import os
import pickle
import random
import sys
import threading
import time
import traceback
from functools import cache, reduce
from multiprocessing.connection import Connection
from types import ModuleType


def end_with_parent() -> None:
    """A killed test session must not leave ranks behind, not even ones that hang in a collective."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@cache
def load(path: str) -> ModuleType:
    name = "ranks_" + path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def answer(request: bytes) -> tuple[bool, object]:
    import numpy as np
    import torch

    from taskmoe.train import distributed

    try:
        path, name, kwargs, port = pickle.loads(request)
        if not torch.distributed.is_initialized():  # the function before has left the group
            os.environ["MASTER_PORT"] = str(port)
            distributed.init(timeout_s=100)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return True, reduce(getattr, name.split("."), load(path))(**kwargs)
    except BaseException:
        return False, traceback.format_exc()


def main() -> None:
    end_with_parent()
    pipe = Connection(int(sys.argv[1]))
    import torch

    from taskmoe.train import distributed

    torch.set_num_threads(1)
    distributed.init(timeout_s=100)
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            break
        reply = answer(request)
        try:
            # Plain pickle: the connection's own would move tensors through /dev/shm once torch is imported.
            message = pickle.dumps(reply)
        except Exception:
            message = pickle.dumps((False, traceback.format_exc()))
        del reply
        gc.collect()
        pipe.send_bytes(message)
    distributed.shutdown()


if __name__ == "__main__":
    main()
