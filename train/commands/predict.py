"""``taskmoe predict``: rows in, rows with answers out."""

from __future__ import annotations

from taskmoe.train.command_line import UsageError, positional, take_option, take_policy

USAGE = """\
usage: taskmoe predict RUN --task NAME [--column NAME] [--unknown_task error|average|nearest]
                       [--key value ...] < inputs.jsonl > outputs.jsonl

Answer the rows on standard input, one JSON object a line, as one task of a run or of one checkpoint in it.
Every row comes back in its place with one column more: the generated text, the label, or of an encoder of
texts its vector. Rows have the columns of the training data, but need no answer, and go through the task's
template; a built-in task takes {"prompt": ...}, a chat {"messages": [...]}. Runs on a GPU where there is one.

  --task NAME     a task of the run
  --column NAME   where the answers stand; default: prediction
  --unknown_task POLICY
                  of a task that the run was not trained on: error (default), average (the run's rule for new
                  tasks, or the mean of its tasks), nearest (the task whose texts are most like the rows that
                  are read first)

A bad line stops the command, which names it once the lines before it are answered. With --on_bad_row skip and
--on_long_row skip such a row gets null, and the reason in <column>_error. Lines are read some batches ahead;
--per_device_eval_batch_size says how many rows run together. Settings are written as for taskmoe eval, but
those of moe are the checkpoint's.

examples:
  taskmoe predict runs/tweeteval --task irony < tweets.jsonl > labels.jsonl
  echo '{"prompt": "a b c >"}' | taskmoe predict runs/quickstart --task reverse --max_new_tokens 8
"""


def run(tokens: list[str]) -> int:
    """``predict RUN --task NAME [--column NAME] [--unknown_task POLICY] [...]``, see ``USAGE``."""
    task, tokens = take_option(tokens, "task")
    column, tokens = take_option(tokens, "column")
    unknown, tokens = take_policy(tokens)
    path, overrides = positional(tokens, "predict", "RUN")
    if task is None:
        raise UsageError("predict: --task is missing; see taskmoe predict --help")
    if column == "":
        raise UsageError("--column: is empty; give the answers a name")
    from taskmoe.train.run_predict import predict_stdin

    return predict_stdin(path, task, overrides, column or "prediction", unknown)
