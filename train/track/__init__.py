"""Following a run: the log file, the terminal, wandb."""
