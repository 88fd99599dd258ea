"""Weighing the losses of tasks by how they behave, and saying what each task's weight is in the end."""
