"""Limits for chat templates: what they may spend in time and memory, and what they may touch.

A template comes with a model, so it is as untrusted as the file it came in. Jinja's sandbox keeps
it away from Python's internals; this module keeps it from hanging the program or filling memory.
"""

from __future__ import annotations

import functools
import operator
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 2.0
MAX_TICKS = 300_000
MAX_WORK = 64_000_000
MAX_RANGE = 10_000
_ITEM_COST = 8
_MAX_BITS = 4096

# The filters that chat templates use. Others (center, format, wordwrap, slice, ...) can be made to
# return any amount of text from a few characters.
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
    *("groupby", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min"),
    *("reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr"),
    *("sort", "string", "sum", "title", "trim", "truncate", "unique", "upper", "wordcount"),
)
_GLOBALS_AWAY = ("lipsum", "cycler", "joiner")
_PADDING = frozenset({"center", "expandtabs", "format_map", "ljust", "rjust", "translate", "zfill"})
_WIDE_FIELD = re.compile(r"\d{4}|:[^{}]*\{")


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self._ticks = MAX_TICKS
        self._work = MAX_WORK
        self._end = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        """Count one round of a loop or one call."""
        self._ticks -= 1
        if self._ticks < 0:
            raise SecurityError(f"it runs for over {MAX_TICKS} rounds")
        if not self._ticks & 0xFF:
            self._check_time()

    def spend(self, amount: int) -> None:
        """Count characters that are about to be made; a list item counts as several."""
        self._work -= amount
        if self._work < 0:
            raise SecurityError(f"it makes over {MAX_WORK} characters")
        self._check_time()

    def size(self, *values: Any) -> None:
        """Spend what handling these values costs."""
        for value in values:
            if isinstance(value, str):
                self.spend(len(value))
            elif isinstance(value, (list, tuple, dict, range)):
                self.spend(len(value) * _ITEM_COST)

    def text(self, value: Any) -> str:
        """Turn a value into text; nested values are counted first, for they may be shared."""
        if not isinstance(value, str):
            self.count_nested(value)
            value = str(value)
        self.spend(len(value))
        return value

    def count_nested(self, value: Any) -> None:
        """Spend what writing out a nested value costs."""
        self.size(value)
        if isinstance(value, dict):
            self.size(*value)
            value = value.values()
        if isinstance(value, (list, tuple, type({}.values()))):
            for item in value:
                self.count_nested(item)

    def _check_time(self) -> None:
        if time.monotonic() > self._end:
            raise SecurityError(f"it takes over {MAX_SECONDS:.0f} seconds")


class GenerationTag(Extension):
    """``{% generation %}`` marks what the model says; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> Any:
        """Return the body as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which loops, calls and growing values are paid from a budget.

    Make one for each rendering.

    Attributes:
        budget: what is left.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        self.budget = Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            cache_size=0,
            finalize=self.budget.text,
            extensions=[GenerationTag, loopcontrols],
        )
        self.filters = {name: self._paid(self.filters[name]) for name in _FILTERS}
        self.filters["join"] = self.guarded_join
        self.filters["replace"] = self.guarded_replace
        self.filters["string"] = self.budget.text
        for name in _GLOBALS_AWAY:
            self.globals.pop(name)
        self.globals["range"] = self.guarded_range
        self.concat = self.guarded_concat  # type: ignore[assignment]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Instrument().visit(super()._parse(source, name, filename))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse Python's internals at once, not only when the value is used."""
        raise SecurityError(f"it reaches for {attribute!r}, which a template may not")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an operation that can make large values from small ones."""
        check, compute = _OPERATIONS[operator]
        check(self.budget, left, right)
        return compute(left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method."""
        budget = __self.budget
        budget.tick()
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        budget.size(owner)
        if isinstance(owner, str):
            check = _METHODS.get(getattr(method, "__name__", ""))
            if check is not None:
                check(budget, owner, args)
        return super().call(__context, __obj, *args, **kwargs)

    def guarded_range(self, *args: int) -> range:
        """A range of at most `MAX_RANGE` numbers."""
        numbers = range(*args)
        if numbers[MAX_RANGE : MAX_RANGE + 1]:
            raise SecurityError(f"a range has over {MAX_RANGE} numbers")
        return numbers

    def guarded_concat(self, pieces: Iterable[str]) -> str:
        """Join output that is captured by a macro or a set block."""
        pieces = list(pieces)
        self.budget.spend(sum(map(len, pieces)))
        return "".join(pieces)

    def join_texts(self, *values: Any) -> str:
        """The operator ``~``."""
        return "".join(map(self.budget.text, values))

    def guarded_join(self, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        """The filter ``join``."""
        if attribute is not None:
            value = (self.getitem(item, attribute) for item in value)
        texts = [self.budget.text(item) for item in value]
        self.budget.spend(len(str(d)) * len(texts))
        return str(d).join(texts)

    def guarded_replace(self, s: Any, old: str, new: str, count: int = -1) -> str:
        """The filter ``replace``."""
        text = self.budget.text(s)
        _check_replace(self.budget, text, (str(old), str(new)))
        return text.replace(str(old), str(new), -1 if count is None else count)

    def nothing(self) -> None:
        """Called in every round of a loop, so that `call` counts it."""

    def _paid(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, with its arguments and its result paid for."""

        @functools.wraps(function)  # keeps jinja's marks on the function
        def paid(*args: Any, **kwargs: Any) -> Any:
            self.budget.tick()
            self.budget.size(*args)
            result = function(*args, **kwargs)
            self.budget.size(result)
            return result

        return paid


class _Instrument(NodeTransformer):
    """Put a counted call into every loop and macro, and take over the operator ``~``."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._count(node)

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call_environment("join_texts", node.nodes, node.lineno)

    def _count(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        tick = _call_environment("nothing", [], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node


def _call_environment(method: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(method, lineno=line)
    return nodes.Call(function, args, [], None, None, lineno=line)


def _check_add(budget: Budget, left: Any, right: Any) -> None:
    budget.size(left, right)


def _check_multiply(budget: Budget, left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(times, int):
            budget.spend(len(value) * max(times, 0) * _ITEM_COST)
    _check_bits(left, right)


def _check_power(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_BITS:
        raise SecurityError("it computes a huge number")


def _check_bits(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if bits > _MAX_BITS:
            raise SecurityError("it computes a huge number")


def _check_modulo(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, str):
        if _WIDE_FIELD.search(left) or "*" in left:
            raise SecurityError("a format has a very wide field")
        budget.count_nested(right)


_OPERATIONS: dict[str, tuple[Callable[[Budget, Any, Any], None], Callable[[Any, Any], Any]]] = {
    "+": (_check_add, operator.add),
    "*": (_check_multiply, operator.mul),
    "**": (_check_power, operator.pow),
    "%": (_check_modulo, operator.mod),
}


def _check_replace(budget: Budget, text: str, args: tuple[Any, ...]) -> None:
    if len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        budget.spend(len(text) + text.count(args[0]) * len(args[1]))


def _check_join(budget: Budget, text: str, args: tuple[Any, ...]) -> None:
    if args and isinstance(args[0], (list, tuple, dict)):
        budget.size(*args[0])
        budget.spend(len(text) * len(args[0]))


def _check_format(budget: Budget, text: str, args: tuple[Any, ...]) -> None:
    if _WIDE_FIELD.search(text):
        raise SecurityError("a format has a very wide field")
    for value in args:
        budget.count_nested(value)


def _check_split(budget: Budget, text: str, args: tuple[Any, ...]) -> None:
    budget.spend(len(text) * _ITEM_COST)


def _refuse_padding(budget: Budget, text: str, args: tuple[Any, ...]) -> None:
    raise SecurityError("it pads text, which a template may not")


_METHODS: dict[str, Callable[[Budget, str, tuple[Any, ...]], None]] = {
    "replace": _check_replace,
    "join": _check_join,
    "format": _check_format,
    "split": _check_split,
    "rsplit": _check_split,
    "splitlines": _check_split,
    **dict.fromkeys(_PADDING, _refuse_padding),
}
