"""What a setting means: the comment behind its field in the source."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from types import ModuleType


def field_comments(module: ModuleType) -> dict[tuple[str, str], str]:
    """{(class, field): the comment on the field's line} of a module's classes."""
    source = inspect.getsource(module)
    on_line = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef)):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                lines = range(item.lineno, (item.end_lineno or item.lineno) + 1)
                comment = " ".join(on_line[n] for n in lines if n in on_line)
                if comment:
                    found[node.name, item.target.id] = comment
    return found
