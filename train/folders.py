"""Folders that a user names: the nearest one, where there is none of that name."""

from __future__ import annotations

import difflib
from pathlib import Path


def nearest_folder(path: Path) -> str:
    """The end of an error's line: "; the nearest is ..." for a folder beside ``path``, or nothing."""
    siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), siblings, n=1, cutoff=0.5)
    return f"; the nearest is {near[0]}" if near else ""
