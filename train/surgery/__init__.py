"""Combining the gradients of tasks: which weight each one gets, and whether it makes a difference."""
