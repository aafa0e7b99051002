"""Arithmetic on sizes, some of them unknown, and one of them the number of rows of a run.

A size is a whole number times symbols. The symbol ``BATCH`` is the number of rows, at least 1. Every other symbol is a
number that is the same for all requests that share a run: the size of an open axis, or what was computed from such.
Equal computations give equal symbols. ``None`` is a number that depends on the number of rows in a way that is not followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

BATCH = 0
MAX_ROWS = 1 << 16
"""Maximum rows of a run."""
MAX_SYMBOLS = 16
"""Maximum symbols in one product."""
MAX_APPLIED = 1_000_000
"""Maximum operators on single elements, for one graph."""
_LARGEST = (1 << 63) - 1


class TooMuch(ValueError):
    """A graph computes more than this module follows."""


class Size(NamedTuple):
    """``factor`` times the product of ``symbols``, which are sorted and may repeat."""

    factor: int
    symbols: tuple[int, ...] = ()

    @property
    def constant(self) -> bool:
        return not self.symbols

    @property
    def batches(self) -> int:
        """Number of factors that are the number of rows."""
        return self.symbols.count(BATCH)


Element = Size | float | None
"""One number of a tensor: a whole one (or a symbol), a floating-point constant, or one that depends on the rows."""

ONE = Size(1)
ROWS = Size(1, (BATCH,))


def times(*sizes: Size) -> Size | None:
    """Return the product; None if it has too many symbols."""
    symbols = tuple(sorted(symbol for size in sizes for symbol in size.symbols))
    factor = math.prod(size.factor for size in sizes)
    if not factor:
        return Size(0)
    return Size(factor, symbols) if len(symbols) <= MAX_SYMBOLS and abs(factor) <= _LARGEST else None


def over(size: Size, divisor: Size) -> Size | None:
    """Return the quotient if it is certainly a whole number, else None."""
    if not divisor.factor or size.factor % divisor.factor:
        return None
    left = list(size.symbols)
    for symbol in divisor.symbols:
        if symbol not in left:
            return None
        left.remove(symbol)
    return Size(size.factor // divisor.factor, tuple(left))


def depends(element: Element) -> bool:
    """Return whether it includes the number of rows."""
    return element is None or (isinstance(element, Size) and BATCH in element.symbols)


def sliced(start: int, end: int, step: int, size: int) -> slice:
    """Return ONNX's slice as Python's, which differ for backward slices that begin or end before the first element."""
    if step > 0:
        return slice(start, end, step)
    return slice(max(start, -size), None if end < -size else end, step)


class Algebra:
    """The symbols of one graph, and operators on elements."""

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}
        self._signed: set[int] = set()
        self._floating: set[int] = set()
        self._applied = 0

    def symbol(self, *key: Hashable, signed: bool = False, floating: bool = False) -> Size:
        """Return the symbol for a key; a new one may be negative, or not whole, only if declared so."""
        number = self._known.setdefault(key, len(self._known) + 1)
        if signed or floating:
            self._signed.add(number)
        if floating:
            self._floating.add(number)
        return Size(1, (number,))

    def positive(self, size: Size) -> bool:
        """Return whether it is at least 1 for any number of rows."""
        return size.factor > 0 and all(symbol == BATCH for symbol in size.symbols)

    def natural(self, size: Size) -> bool:
        """Return whether it is a whole number that is not negative."""
        return size.factor >= 0 and not self._signed.intersection(size.symbols)

    def is_floating(self, size: Size) -> bool:
        """Return whether it may be a fraction."""
        return bool(self._floating.intersection(size.symbols))

    def apply(self, operator: str, operands: tuple[Element, ...], *, floating: bool = False) -> Element:
        """Apply one operator to elements; ``floating``: its result is treated as floating-point."""
        self._applied += 1
        if self._applied > MAX_APPLIED:
            raise TooMuch(f"the graph computes more than {MAX_APPLIED} sizes")
        if operator == "Where":
            return self._where(operands)
        if any(operand is None for operand in operands):
            return None
        plain = [_plain(operand) for operand in operands]
        if None not in plain:
            found = _constant(operator, [value for value in plain if value is not None])
            if found is not None:
                return found
        whole = [operand for operand in operands if isinstance(operand, Size)]
        if None in plain and len(whole) == len(operands) and not any(map(self.is_floating, whole)):
            known = self._whole(operator, whole)
            if known is not None:
                return known
        if any(depends(operand) for operand in operands):
            return None
        inexact = len(whole) < len(operands) or any(map(self.is_floating, whole))
        fractional = floating or (operator in _KEEP_KIND and inexact)
        return self.symbol(operator, operands, signed=True, floating=fractional)

    def _where(self, operands: tuple[Element, ...]) -> Element:
        condition, yes, no = operands
        if isinstance(condition, Size) and condition.constant:
            return yes if condition.factor else no
        if yes == no:
            return yes
        if any(depends(operand) for operand in operands):
            return None
        floating = any(isinstance(one, float) or (isinstance(one, Size) and self.is_floating(one)) for one in (yes, no))
        return self.symbol("Where", operands, signed=True, floating=floating)

    def _whole(self, operator: str, sizes: list[Size]) -> Size | None:
        """Return the result of an operator on whole numbers of which at least one has symbols."""
        if operator == "Mul":
            return times(*sizes)
        if operator == "Abs":
            return sizes[0] if self.natural(sizes[0]) else None
        pairs: dict[str, Callable[[str, Size, Size], Size | None]] = {
            **dict.fromkeys(("Add", "Sub"), _sum),
            **dict.fromkeys(("Div", "Mod"), _quotient),
            **dict.fromkeys(("Max", "Min"), self._extreme),
            **dict.fromkeys(_COMPARISONS, self._compare),
        }
        return pairs[operator](operator, *sizes) if operator in pairs and len(sizes) == 2 else None

    def _extreme(self, operator: str, a: Size, b: Size) -> Size | None:
        if a == b:
            return a
        for one, other in ((a, b), (b, a)):
            if one.constant and (
                (one.factor <= 0 and self.natural(other)) or (one.factor <= 1 and self.positive(other))
            ):
                return other if operator == "Max" else one
        return None

    def _compare(self, operator: str, a: Size, b: Size) -> Size | None:
        if a == b:
            return Size(int(operator in ("Equal", "LessOrEqual", "GreaterOrEqual")))
        for one, other, greater in ((a, b, True), (b, a, False)):
            if other.constant and (
                (self.natural(one) and other.factor < 0) or (self.positive(one) and other.factor < one.factor)
            ):
                if operator == "Equal":
                    return Size(0)
                return Size(int(operator.startswith("Greater") == greater))
        return None


def _plain(element: Element) -> int | float | None:
    if isinstance(element, Size):
        return element.factor if element.constant else None
    return element


def _sum(operator: str, a: Size, b: Size) -> Size | None:
    sign = 1 if operator == "Add" else -1
    if a.symbols == b.symbols:
        total = a.factor + sign * b.factor
        return Size(total, a.symbols) if total else Size(0)
    if b == Size(0):
        return a
    return b if a == Size(0) and sign == 1 else None


def _quotient(operator: str, a: Size, b: Size) -> Size | None:
    found = over(a, b)
    if found is None:
        return None
    return found if operator == "Div" else Size(0)


_COMPARISONS = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
_KEEP_KIND = ("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Neg", "Abs", "Floor", "Ceil", "Sqrt", "Pow")
"""Operators whose result is floating-point if an operand is."""


def _divided(a: float, b: float) -> float:
    if isinstance(a, int) and isinstance(b, int):
        # ONNX divides whole numbers towards zero.
        return abs(a) // abs(b) * (1 if (a >= 0) == (b >= 0) else -1)
    return a / b


_CONSTANT: dict[str, Callable[..., int | float | bool]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divided,
    "Min": min,
    "Max": max,
    "Mod": lambda a, b: a % b,
    "Neg": lambda a: -a,
    "Abs": abs,
    "Floor": lambda a: float(math.floor(a)),
    "Ceil": lambda a: float(math.ceil(a)),
    "Equal": lambda a, b: a == b,
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "Not": lambda a: not a,
    "And": lambda a, b: bool(a) and bool(b),
    "Or": lambda a, b: bool(a) or bool(b),
}


def _constant(operator: str, values: list[int | float]) -> Element:
    compute = _CONSTANT.get(operator)
    if compute is None or (operator in ("Min", "Max") and len(values) == 1) or not all(map(math.isfinite, values)):
        return None
    try:
        found = compute(*values)
    except (ArithmeticError, TypeError, ValueError):
        return None
    if isinstance(found, float):
        # Exact in every supported floating-point type, of which the shortest has 11 bits.
        return found if found.is_integer() and abs(found) <= 1 << 11 else None
    # Fits every supported whole type.
    return Size(int(found)) if abs(int(found)) < 1 << 31 or found in values else None
