# SPDX-License-Identifier: BSD-3-Clause
"""Every error message and warning of the sources, with … for what a call fills in. No tests here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OF_COMMANDS = {"compare", "verify.py", "_verify_steps.py", "_files.py"}  # commands, whose output explains itself


def of_python() -> Iterator[tuple[str, str]]:
    """Place and text of every error and warning in ``ffn_ops/``."""
    for path in sorted((ROOT / "ffn_ops").rglob("*.py")):
        if OF_COMMANDS & set(path.relative_to(ROOT).parts):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {
            node.targets[0].id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _is_text(node.value)
        }
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            warns = isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
            if isinstance(call, ast.Call) and call.args and (warns or isinstance(node, ast.Raise)):
                text = re.sub("…[…]+", "…", _text(call.args[0], texts))
                if text != "…":  # an error of another place, passed on
                    yield f"{path.relative_to(ROOT)}:{call.lineno}", text


REASONS = re.compile("^(state|changed|_entry|_experts|.*why.*)$")  # functions of _replace/ that put reasons together


def of_reports() -> Iterator[tuple[str, str]]:
    """The same of the reasons in ``replace_report`` that nothing raises: sentences of those functions, and those that
    a result of recognition is given."""
    for path in sorted((ROOT / "ffn_ops" / "_replace").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            holds = isinstance(node, ast.Call) and ast.unparse(node.func) in ("Finding", "_Seen")
            names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "why"
            if holds or names or (isinstance(node, ast.FunctionDef) and REASONS.match(node.name)):
                for value in _sentences(node):
                    yield f"{path.relative_to(ROOT)}:{value.lineno}", re.sub("…[…]+", "…", _text(value, {}))


def _sentences(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Compare) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return  # what is compared with, and a docstring
    if isinstance(node, (ast.JoinedStr, ast.Constant)):
        if _is_text(node) and len(re.sub(r"[…().,:]", " ", _text(node, {})).split()) > 1:
            yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from _sentences(child)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _text(node: ast.expr, names: dict[str, ast.expr]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, names)
    if isinstance(node, ast.Name) and node.id in names:
        return _text(names[node.id], {name: text for name, text in names.items() if name != node.id})
    return "…"


def of_cpp() -> Iterator[tuple[str, str]]:
    """The same of ``csrc/``, whose checks all go through STD_TORCH_CHECK(condition, parts of the message ...)."""
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        source = path.read_text(encoding="utf-8")
        for match in re.finditer(r"\bSTD_TORCH_CHECK\(", source):
            parts = _arguments(source, match.end())[1:]
            literals = [re.findall(r'"((?:[^"\\]|\\.)*)"', part) if part.startswith('"') else ["…"] for part in parts]
            text = re.sub("…[…]+", "…", "".join("".join(each) for each in literals))
            yield f"{path.relative_to(ROOT)}:{source[: match.start()].count(chr(10)) + 1}", text.strip()


def _arguments(source: str, at: int) -> list[str]:
    """The arguments of a call, the first of which begins at ``at``."""
    depth, start, found = 0, at, []
    while depth >= 0:
        if source[at] == '"':
            at += 1
            while source[at] != '"':
                at += 2 if source[at] == "\\" else 1
        elif source[at] in "([{":
            depth += 1
        elif source[at] in ")]}":
            depth -= 1
        if depth < 0 or (depth == 0 and source[at] == ","):
            found.append(source[start:at].strip())
            start = at + 1
        at += 1
    return found
