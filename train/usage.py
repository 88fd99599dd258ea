"""What ``--help`` prints."""

from __future__ import annotations

from taskmoe.train.commands import adapt, export, merge, predict, select

_SETTINGS = """\
Settings are written --section.key value or --section.key=value, after the file or before it:
  --data.max_length 256    a key and its section
  --max_length 256         the section may be left out where only one section has the key
  --bf16                   a switch alone means true
  --datasets.0.path x      an item of a list, counted from 0
  --model.hidden_size 64   a key of a mapping
  --mixing.cap null        takes back what the file says
taskmoe config --schema lists all keys.
"""

USAGE: dict[str, str] = {
    "": """\
usage: taskmoe COMMAND ...

Train task-level mixtures of experts. configs/methods/ holds the methods of the literature, a file each.

  train CFG.yaml    train a model
  eval RUN          score a trained run
  predict RUN       answer rows from standard input as one task of a run
  inspect RUN       show what the router learned: of a run, a checkpoint or a saved adapter
  compare RUN RUN   set the scores of runs side by side, seeds paired
  adapt RUN FILE    learn new tasks from a few rows, by one way or by all
  export RUN        write what a task uses as an adapter that peft and vLLM load
  merge RUN ...     merge the LoRAs of tasks, experts, runs or adapters into one
  select RUN|CFG    rank the tasks that a task may learn from, or group tasks
  config CFG.yaml   print the settings of a run, with all defaults and overrides in place
  tune              measure how this GPU runs the kernels fastest, and remember it

  --help            this text; taskmoe COMMAND --help says more
  --version         the version

example:
  taskmoe train configs/quickstart.yaml --num_ranks 2
""",
    "train": f"""\
usage: taskmoe train CFG.yaml [--key value ...] [--num_ranks N]

Train as CFG.yaml says, in one process; with --num_ranks N in N processes under DeepSpeed's launcher.
The launcher may also be called directly: deepspeed --num_gpus N --module taskmoe.train.cli train CFG.yaml

{_SETTINGS}
examples:
  taskmoe train configs/quickstart.yaml --num_ranks 2
  taskmoe train configs/llama_rank1.yaml --learning_rate 3e-4 --r 2 --output_dir runs/a
  taskmoe train configs/llama_rank1.yaml --output_dir runs/a --resume_from_checkpoint true
""",
    "eval": f"""\
usage: taskmoe eval RUN [--split train|validation|test] [--data DIR] [--baseline RUN2]
                    [--unknown_task error|average|nearest] [--json] [--key value ...]

Score a run folder, or one checkpoint in it, task by task.

  --split SPLIT   which rows; default: the run's eval_split
  --data DIR      other data, one folder a task with train|validation|test.jsonl (the same as --data.root DIR)
  --baseline RUN2 score another run or checkpoint on the same split, and compare: differences, the average
                  relative gain (without tasks on which RUN2 is under 0.01), means, medians, wins
  --unknown_task POLICY
                  of tasks that the run was not trained on: error (default), average (the run's rule for new
                  tasks, or the mean of its tasks), nearest (the task whose texts are most like theirs)
  --json          print one JSON object and nothing else

{_SETTINGS}
examples:
  taskmoe eval runs/poly --baseline runs/average --split test
  taskmoe eval runs/tweeteval --data.root other/tweeteval --split test --json
""",
    "predict": predict.USAGE,
    "inspect": """\
usage: taskmoe inspect RUN|CHECKPOINT [--layer PATTERN] [--json] [--html OUT]

Show which tasks share experts, which experts are dead, which tasks disagree, what changed since the start.
Takes a run folder (its newest checkpoint), a checkpoint, or a folder of save_pretrained; needs neither the
data, the base model nor a GPU.

  --layer PATTERN   only routing groups whose name contains PATTERN; with * and ?: whose whole name matches
  --json            print one JSON object and nothing else (docs/TRACKING.md says what is in it)
  --html OUT        also write the report, one file that opens from disk

examples:
  taskmoe inspect runs/quickstart
  taskmoe inspect runs/quickstart/checkpoint-100 --layer '*.1.*q_proj' --json
  taskmoe inspect runs/quickstart --html report.html
""",
    "compare": """\
usage: taskmoe compare RUN1 RUN2 ... [--json] [--html OUT] [--markdown OUT]

Compare the last evaluations of finished runs, task by task. Runs whose settings differ in nothing but the
seed are one arm. Arms are compared with that of RUN1: differences, the average relative gain, and 95 %
confidence intervals over the seeds that both have.

  --json           print one JSON object and nothing else (docs/TRACKING.md says what is in it)
  --html OUT       also write tables and a plot, one file that opens from disk
  --markdown OUT   also write the tables as markdown

examples:
  taskmoe compare runs/average runs/poly
  taskmoe compare runs/lora-s0 runs/lora-s1 runs/poly-s0 runs/poly-s1 --markdown poly.md
""",
    "adapt": adapt.USAGE,
    "export": export.USAGE,
    "merge": merge.USAGE,
    "select": select.USAGE,
    "config": f"""\
usage: taskmoe config CFG.yaml [--key value ...]
       taskmoe config --schema

Print the settings of a run as YAML: checked, with defaults and overrides in place.
With --schema: a JSON schema of all keys, with types, defaults and descriptions.

{_SETTINGS}
example:
  taskmoe config configs/quickstart.yaml --max_steps 100
""",
    "tune": """\
usage: taskmoe tune [--out FILE] [--budget SECONDS]

Measure the launches of the Triton kernels on this GPU and write those that beat the built-in table. Later
runs on a GPU of this name use them. Never needed: without the file the table is used.

  --out FILE         default: $TASKMOE_KERNEL_CONFIGS, or ~/.cache/taskmoe/kernels.json
  --budget SECONDS   default: 600

example:
  taskmoe tune --budget 120
""",
}
