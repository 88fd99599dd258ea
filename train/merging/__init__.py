"""``taskmoe merge``: several LoRAs, of runs and of peft's folders, as one."""
