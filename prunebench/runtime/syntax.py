"""Python files as syntax: how planning reads methods and recoveries without running them."""

import ast


def keyword_defaults(function: ast.FunctionDef) -> dict[str, ast.expr] | None:
    """The defaults of a function's parameters but the first, by name; None where one has none."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.args[1:], *arguments.kwonlyargs)]
    defaults = [default for default in (*arguments.defaults, *arguments.kw_defaults) if default]
    return dict(zip(names, defaults, strict=True)) if len(names) == len(defaults) else None
