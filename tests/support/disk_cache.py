"""JSON kept in the user's cache folder under the hash of everything that decides it; and what code means, for a key."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cibr_kernels"


def digest(key: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in key:
        found.update(f"{len(part)}:{part}".encode())
    return found.hexdigest()


def meaning(code: ast.Module) -> str:
    """Python code without comments, layout, docstrings, and the empty lists that not every version of Python prints."""
    for node in ast.walk(code):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [part for part in node.body if not _is_text(part)]
    return re.sub(r"(, )?\b\w+=\[\]", "", ast.dump(code)).replace("(, ", "(")


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def cached(key: Iterable[str], compute: Callable[[], Any]) -> Any:
    """What compute() returned when the same key was asked for, or returns now.

    A file is written whole and then named, so a worker of several never reads half of one; two may both compute.
    """
    path = FOLDER / f"{digest(key)}.json"
    if path.exists():
        return json.loads(path.read_text())
    value = compute()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=FOLDER, suffix=".partial", delete=False) as partial:
        json.dump(value, partial)
    os.replace(partial.name, path)
    return value
