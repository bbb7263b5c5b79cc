"""A small, safe language of conditions over a table's columns: parsed, checked, never run as Python."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import ConfigError

Value = Any  # an array with a row per particle, a number, a string or True/False

_COMPARE: dict[type[ast.cmpop], Callable[[Value, Value], Value]] = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Value, Value], Value]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Mod: np.mod,
    ast.Pow: np.power,
}
_FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    "abs": np.abs,
    "sqrt": np.sqrt,
    "log": np.log,
    "exp": np.exp,
}
LONGEST = 2000


def evaluate_condition(text: str, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Rows at which a condition holds.

    Allowed are column names, numbers, quoted strings, True and False; `< <= > >= == !=` (chained as in
    `0 < z_0 < 1`), `in (…)` and `not in (…)`; `and or not`, `& | ~`; `+ - * / % **`; abs, sqrt, log, exp.
    NaN equals nothing: a comparison with it is false, but `!=` and `not in` are true.

    Parameters
    ----------
    text
        The condition, such as `loss < 1.5 and (cluster in (0, 3) or abs(z_0) > 2)`.
    columns
        Arrays `(N,)` by name.

    Returns
    -------
    mask
        `(N,)` bool.

    Raises
    ------
    ConfigError
        If the text is no such condition or names an unknown column; the message lists the columns.
    """
    try:
        if len(text) > LONGEST:
            raise ConfigError(f"condition of {len(text)} characters, at most {LONGEST} are read")
        tree = ast.parse(text.strip(), mode="eval")
        with np.errstate(all="ignore"):
            result = np.asarray(_value(tree.body, columns))
    except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
        raise ConfigError(f"condition {text!r} cannot be read: {error}") from error
    except TypeError as error:  # numpy: text compared with a number, and the like
        raise ConfigError(f"condition {text!r} mixes text and numbers: {error}") from error
    rows = len(next(iter(columns.values())))
    if result.dtype != np.bool_:
        raise ConfigError(
            f"condition {text!r} gives numbers, not true or false; compare them, as in `z_0 > 1`"
        )
    return np.broadcast_to(result, (rows,)).copy()


def unknown_column(name: str, columns: Mapping[str, Any]) -> ConfigError:
    """The error for a column that is not there, with the columns that are."""
    hint = (
        " (run `analyze` first for cluster, junk, pc_ and umap_ columns)" if "cluster" not in columns else ""
    )
    return ConfigError(f"no column {name!r}; there are: {', '.join(columns)}{hint}")


def _value(node: ast.expr, columns: Mapping[str, NDArray[Any]]) -> Value:
    match node:
        case ast.Name(id=name):
            if name not in columns:
                raise unknown_column(name, columns)
            return columns[name]
        case ast.Constant(value=bool() | int() | float() | str() as constant):
            return constant
        case ast.BoolOp(op=operator, values=parts):
            combine = np.logical_and if isinstance(operator, ast.And) else np.logical_or
            result = _truth(parts[0], columns)
            for part in parts[1:]:
                result = combine(result, _truth(part, columns))
            return result
        case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
            return np.logical_not(_truth(operand, columns))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return np.negative(_number(operand, columns))
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _number(operand, columns)
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return np.logical_and(_truth(left, columns), _truth(right, columns))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return np.logical_or(_truth(left, columns), _truth(right, columns))
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _ARITHMETIC:
            return _ARITHMETIC[type(operator)](_number(left, columns), _number(right, columns))
        case ast.Compare(left=left, ops=operators, comparators=others):
            return _comparison(left, operators, others, columns)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](_number(argument, columns))
    raise ConfigError(
        f"{ast.unparse(node)!r} is not allowed in a condition: comparisons, and/or/not, arithmetic, "
        f"{', '.join(_FUNCTIONS)} over columns are"
    )


def _comparison(
    left: ast.expr, operators: list[ast.cmpop], others: list[ast.expr], columns: Mapping[str, NDArray[Any]]
) -> Value:
    result: Value = np.True_
    for operator, right in zip(operators, others, strict=True):
        if isinstance(operator, ast.In | ast.NotIn):
            if not isinstance(right, ast.Tuple | ast.List | ast.Set):
                raise ConfigError(f"`in` wants a list such as (0, 3), found {ast.unparse(right)!r}")
            here = _value(left, columns)
            found: Value = np.False_
            for element in right.elts:
                found = np.logical_or(found, np.equal(here, _value(element, columns)))
            holds = np.logical_not(found) if isinstance(operator, ast.NotIn) else found
        elif type(operator) in _COMPARE:
            holds = _COMPARE[type(operator)](_value(left, columns), _value(right, columns))
        else:
            raise ConfigError("`is` is not allowed in a condition; use ==")
        result = np.logical_and(result, holds)
        left = right
    return result


def _truth(node: ast.expr, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    value = np.asarray(_value(node, columns))
    if value.dtype != np.bool_:
        raise ConfigError(
            f"{ast.unparse(node)!r} is no condition where one is needed; with & and | put comparisons in "
            "brackets, as in `(z_0 > 1) & (z_1 < 0)`"
        )
    return value


def _number(node: ast.expr, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    value = np.asarray(_value(node, columns))
    if value.dtype.kind not in "fiu":
        raise ConfigError(f"{ast.unparse(node)!r} is no number where one is needed")
    return value.astype(np.float64)
