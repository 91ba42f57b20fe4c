# SPDX-License-Identifier: BSD-3-Clause
"""A part of a method's source, from what goes into some children to what another gives: whether it can be taken out,
the part as a function, and the method around it. Nothing is run here.
"""

from __future__ import annotations
import __future__

import ast
import copy
import dis
import functools
import inspect
import itertools
import types
from collections.abc import Iterator
from typing import Any

from .probe import ProbeError

Names = tuple[tuple[str, ...], str]  # children: those that go first, and the last
_RESULT, _INPUT = "_ffn_ops_y", "_ffn_ops_x"
_FUTURE = functools.reduce(
    int.__or__, [getattr(__future__, name).compiler_flag for name in __future__.all_feature_names]
)
_JUMPS = {*dis.hasjrel, *dis.hasjabs}
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.If, ast.Pass, ast.Assert)
_REFUSED = (
    ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp,
    ast.GeneratorExp,
)  # fmt: skip
_CONDITION = (
    ast.Name, ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.cmpop, ast.boolop, ast.unaryop,
    ast.expr_context,
)  # fmt: skip
_ONCE = (ast.Call, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Tuple, ast.List, ast.Attribute, ast.Subscript)


@functools.cache
def source(code: Any) -> ast.FunctionDef:
    """Of a function, checked to be what runs. Raises: ProbeError."""
    try:
        lines, start = inspect.getsourcelines(code)
        tree: Any = ast.parse("if 1:\n" + "".join(lines) if lines[0][0].isspace() else "\n" + "".join(lines))
    except (OSError, TypeError, SyntaxError, IndexError):
        raise ProbeError(f"the source of {code.co_name} is not at hand") from None
    function = tree.body[0].body[0] if isinstance(tree.body[0], ast.If) else tree.body[0]
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        raise ProbeError(f"{code.co_name} is not a plain method")
    ast.increment_lineno(function, start - 2)
    if not _same_code(_compiled(function, code), code):
        raise ProbeError(f"the source of {code.co_name} is not what runs")
    return function


def _compiled(function: ast.FunctionDef, like: Any) -> Any:
    """Its code, with the names from outside that ``like`` has from outside."""
    bare = copy.copy(function)
    bare.decorator_list, bare.returns = [], None
    bare.args = copy.deepcopy(function.args)
    bare.args.defaults = [ast.Constant(None) for _ in bare.args.defaults]
    bare.args.kw_defaults = [default and ast.Constant(None) for default in bare.args.kw_defaults]
    for argument in ast.walk(bare.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    outside = ast.arguments([], [ast.arg(name) for name in like.co_freevars], None, [], [], None, [])
    around = ast.FunctionDef("around", outside, [bare], [])
    if hasattr(around, "type_params"):
        around.type_params = []
    module = ast.fix_missing_locations(ast.Module([around], []))
    code: Any = compile(module, like.co_filename, "exec", flags=like.co_flags & _FUTURE, dont_inherit=True)
    for _ in range(2):
        code = next(each for each in code.co_consts if isinstance(each, types.CodeType))
    return code


def _same_code(a: Any, b: Any) -> bool:
    """Up to the two ways to call an attribute: which of them is compiled depends on what its module imports."""

    def of(code: Any) -> Any:
        steps = [
            (
                step.opname.replace("LOAD_METHOD", "LOAD_ATTR"),
                None if step.opcode in _JUMPS else (type(step.argval), step.argval),
            )
            for step in dis.get_instructions(code)
            if step.opname not in ("PUSH_NULL", "PRECALL", "EXTENDED_ARG")
            and not isinstance(step.argval, types.CodeType)
        ]
        inner = [of(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
        return steps, inner, code.co_varnames, code.co_freevars, code.co_cellvars

    return bool(of(a) == of(b))


def function_of(tree: ast.FunctionDef, like: Any, name: str) -> Any:
    code = _compiled(tree, like.__code__)
    cells = dict(zip(like.__code__.co_freevars, like.__closure__ or (), strict=True))
    closure = tuple([cells[free] for free in code.co_freevars])
    made = types.FunctionType(code, like.__globals__, name, None, closure)
    if name == like.__name__:
        made.__defaults__, made.__kwdefaults__ = like.__defaults__, like.__kwdefaults__
    return made


def called(node: ast.Call, function: ast.FunctionDef) -> tuple[str, tuple[int, int]] | None:
    """Of a call of an attribute of self: its name, and where its arguments end, which is when it is called."""
    at = node.func
    if isinstance(at, ast.Attribute) and isinstance(at.value, ast.Name) and at.value.id == function.args.args[0].arg:
        return at.attr, (node.end_lineno or 0, node.end_col_offset or 0)
    return None


def named(names: Names) -> str:
    return f"{', '.join(names[0])} and {names[1]}"


class FromOutsideError(ProbeError):
    """The last linear layer gets what the caller gave besides: this is no feed-forward layer, but a gate."""


class Segment:
    """Of a method's source: from what goes into the first layers to what the last one gives."""

    def __init__(self, tree: ast.FunctionDef, names: Names, code: Any) -> None:
        self.tree, self.names = copy.deepcopy(tree), names
        tree, self.elsewhere = self.tree, self._push_down()
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.me = tree.args.args[0].arg
        *self.firsts, self.last = [self._call(name) for name in (*names[0], names[1])]
        inputs = [call.args[0] for call in self.firsts]
        given = {node.id for node in inputs if isinstance(node, ast.Name)}
        if len(inputs) > 1 and (len(given) != 1 or not all(isinstance(node, ast.Name) for node in inputs)):
            raise ProbeError(f"{' and '.join(names[0])} are called with different inputs")
        self.given: ast.expr = inputs[0]
        self.input = given.pop() if given else _INPUT
        self.body, self.begin, self.end = self._place()
        self._check(code)

    def _call(self, name: str) -> ast.Call:
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call) and node not in self.elsewhere]
        calls = [node for node in nodes if (called(node, self.tree) or ("",))[0] == name]
        if len(calls) != 1:
            raise ProbeError(f"{name} is called in {len(calls)} places")
        if len(calls[0].args) != 1 or calls[0].keywords or isinstance(calls[0].args[0], ast.Starred):
            raise ProbeError(f"{name} is called with arguments other than one tensor")
        return calls[0]

    def _push_down(self) -> set[ast.AST]:
        """Moves what is before an ``if`` that does not depend on it into both branches, where one of them calls the
        last layer. Returns what is in the other one."""

        def calls(node: ast.AST, names: tuple[str, ...]) -> bool:
            every = [called(each, self.tree) for each in ast.walk(node) if isinstance(each, ast.Call)]
            return any(each is not None and each[0] in names for each in every)

        for node in ast.walk(self.tree):
            blocks: list[Any] = [getattr(node, name, None) for name in ("body", "orelse")]
            for block in [each for each in blocks if isinstance(each, list)]:
                for end, last in enumerate(block):
                    begin = next((i for i in range(end) if calls(block[i], self.names[0])), None)
                    if not isinstance(last, ast.If) or begin is None or not calls(last, (self.names[1],)):
                        continue
                    moved = block[begin:end]
                    stored = {
                        each.id
                        for part in moved
                        for each in ast.walk(part)
                        if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load)
                    }
                    if all(
                        isinstance(each, _CONDITION) and getattr(each, "id", None) not in stored
                        for each in ast.walk(last.test)
                    ):
                        here = last.body if any(calls(each, (self.names[1],)) for each in last.body) else last.orelse
                        there = last.orelse if here is last.body else last.body
                        there[:0] = copy.deepcopy(moved)
                        here[:0] = moved
                        del block[begin:end]
                        return {below for each in there for below in ast.walk(each)}
        return set()

    def _above(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents:
            node = self.parents[node]
            yield node

    def _place(self) -> tuple[list[ast.stmt], int, int]:
        """The innermost list of statements with all of it; the indices of the first and the last one."""

        def places(node: ast.AST) -> list[tuple[list[ast.stmt], int]]:
            found = []
            for each in (node, *self._above(node)):
                for name in ("body", "orelse", "handlers", "finalbody"):
                    block = getattr(self.parents.get(each), name, None)
                    if isinstance(block, list) and each in block:
                        found.append((block, block.index(each)))
            return found

        all_of = [places(call) for call in (*self.firsts, self.last)]
        for block, end in all_of[-1]:
            at = [next((i for other, i in each if other is block), None) for each in all_of[:-1]]
            if None not in at:
                return block, min(i for i in at if i is not None), end
        raise ProbeError(f"{named(self.names)} are not called one after the other")

    @property
    def _inside(self) -> list[ast.AST]:
        """What becomes the part."""
        return [*self.body[self.begin : self.end], self.last]

    def _nodes(self) -> list[ast.AST]:
        skipped = {node for call in self.firsts for node in ast.walk(call.args[0])} if self.input == _INPUT else set()
        return [node for each in self._inside for node in ast.walk(each) if node not in skipped]

    @property
    def asked(self) -> frozenset[str] | None:
        """Attributes of self, or None where self as a whole is given to somebody."""
        own = [node for node in self._nodes() if isinstance(node, ast.Name) and node.id == self.me]
        above = [self.parents[node] for node in own]
        names = [node.attr for node in above if isinstance(node, ast.Attribute)]
        return frozenset(names) if len(names) == len(above) else None

    def _check(self, code: Any) -> None:
        nodes = self._nodes()
        if any(call not in nodes for call in self.firsts):
            raise ProbeError(f"{named(self.names)} are called in different branches")
        between = f"between {' and '.join(self.names[0])} and {self.names[1]} it"
        for node in nodes:
            if isinstance(node, _REFUSED) or (isinstance(node, ast.stmt) and not isinstance(node, _SIMPLE)):
                raise ProbeError(f"{between} does more than to compute: {ast.unparse(node)[:60]}")
            if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
                raise ProbeError(f"{between} keeps what it computes: {ast.unparse(node)[:60]}")
        names = [node for node in nodes if isinstance(node, ast.Name)]
        stored = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        own = {*code.co_varnames, *code.co_cellvars} - {self.me, self.input}
        skipped = set(nodes)
        if others := [name for name in self._read_first(self._inside, set(), skipped) if name in own]:
            given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            raise (FromOutsideError if others[0] in given else ProbeError)(f"{between} also reads {others[0]}")
        if self.me in stored or set(code.co_cellvars) & stored:
            raise ProbeError(f"{between} binds {self.me} or what inner functions see")
        if self.begin < self.end:
            for call in self.firsts:
                if self._statement(call) not in self.body:
                    raise ProbeError(f"{named(self.names)} are called in different branches")
            self._check_end(stored, between)

    def _read_first(self, block: list[Any], known: set[str], nodes: set[ast.AST]) -> Iterator[str]:
        """Names that are read before they are bound here."""
        for each in block:
            here = each.test if isinstance(each, ast.If) else each
            names = [node for node in ast.walk(here) if isinstance(node, ast.Name) and node in nodes]
            loads = [node.id for node in names if isinstance(node.ctx, ast.Load) or isinstance(each, ast.AugAssign)]
            yield from [name for name in loads if name not in known]
            known |= {node.id for node in names if not isinstance(node.ctx, ast.Load)}
            if isinstance(each, ast.If):
                branches = [set(known), set(known)]
                for part, bound in zip((each.body, each.orelse), branches, strict=True):
                    yield from self._read_first(part, bound, nodes)
                known |= branches[0] | branches[1]

    def _statement(self, node: ast.AST) -> ast.AST:
        return next(each for each in self._above(node) if isinstance(each, ast.stmt))

    def _check_end(self, stored: set[str], between: str) -> None:
        """The last statement calls the last layer before all else, and what was between is not looked at later."""
        statement = self.body[self.end]
        inside = set(ast.walk(self.last))
        above = list(itertools.takewhile(lambda node: node is not statement, self._above(self.last)))
        if self._statement(self.last) is not statement:
            raise ProbeError(f"{named(self.names)} are called in different branches")
        ok = all(isinstance(node, _ONCE) for node in above)
        for node in ast.walk(statement):
            if isinstance(node, (ast.Call, *_REFUSED)) and node not in inside and node not in above:
                ok = ok and (node.lineno, node.col_offset) >= (self.last.end_lineno, self.last.end_col_offset)
        if not ok:
            raise ProbeError(f"{self.names[1]} is not called first in its statement")
        if (
            isinstance(statement, ast.AugAssign)
            and {node.id for node in ast.walk(statement.target) if isinstance(node, ast.Name)} & stored
        ):
            raise ProbeError(f"{between} computes what {ast.unparse(statement.target)} is added to")
        single: Any = getattr(statement, "target", None)
        targets: list[Any] = statement.targets if isinstance(statement, ast.Assign) else [single]
        bound = {node.id for node in targets if isinstance(node, ast.Name)}
        loops = any(isinstance(node, (ast.For, ast.While)) for node in self._above(statement))
        here = set(ast.walk(statement))
        before = {node for each in self.body[self.begin : self.end] for node in ast.walk(each)}
        for node in set(ast.walk(self.tree)) - self.elsewhere:
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store) and node.id in stored:
                later = loops or (node.lineno, node.col_offset) > (self.last.end_lineno, self.last.end_col_offset)
                read = node in here or (later and node.id not in bound)
                if read and node not in inside and node not in before:
                    raise ProbeError(f"{between} computes {node.id}, which it reads later")

    def inner(self) -> ast.FunctionDef:
        """The part as a function of self and its input."""
        given = {id(call.args[0]) for call in self.firsts} if self.input == _INPUT else set()
        statements = [_swapped(each, given, ast.Name(_INPUT, ast.Load())) for each in self.body[self.begin : self.end]]
        result = _swapped(self.last, given, ast.Name(_INPUT, ast.Load()))
        arguments = ast.arguments([], [ast.arg(self.me), ast.arg(self.input)], None, [], [], None, [])
        return self._named("part", arguments, [*statements, ast.Return(result)])

    def outer(self, name: str) -> ast.FunctionDef:
        """The method, which calls the part."""
        call: ast.expr = ast.Call(ast.Attribute(ast.Name(self.me, ast.Load()), name, ast.Load()), [self.given], [])
        ast.copy_location(call, self.last)
        if self.begin == self.end:
            return _swapped(self.tree, {id(self.last)}, call)
        first = ast.copy_location(ast.Assign([ast.Name(_RESULT, ast.Store())], call), self.body[self.begin])
        statement = _swapped(self.body[self.end], {id(self.last)}, ast.Name(_RESULT, ast.Load()))
        body = [*self.body[: self.begin], first, statement, *self.body[self.end + 1 :]]
        return _swapped(self.tree, {id(self.body)}, body)

    def _named(self, name: str, arguments: Any, body: list[Any]) -> ast.FunctionDef:
        made = ast.FunctionDef(name, arguments, body, [])
        if hasattr(made, "type_params"):
            made.type_params = []
        return ast.fix_missing_locations(ast.copy_location(made, self.tree))


def _swapped(tree: Any, which: set[int], by: Any) -> Any:
    """A copy of a tree, with ``by`` in the place of a node or of a list of statements."""
    if id(tree) in which:
        return by
    if isinstance(tree, list):
        return [_swapped(each, which, by) for each in tree]
    if not isinstance(tree, ast.AST):
        return tree
    made = type(tree)(**{name: _swapped(value, which, by) for name, value in ast.iter_fields(tree)})
    return ast.copy_location(made, tree)
