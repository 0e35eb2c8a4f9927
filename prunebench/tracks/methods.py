"""Discovery of method files. Metadata are literals and are read without running the file.

A method file holds a docstring, whose first line is the idea, literal constants and
`select(context, ...)`. Reading it as syntax only lets the workflow plan without importing torch and
finds a broken file before anything runs. `docs/add_a_method.md` explains the contract.
"""

import ast
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prunebench import models
from prunebench.errors import CellError, UserError
from prunebench.runtime import resources

KINDS = ("none", "layers", "widths", "weights", "steps")
RECOVERY = ("optional", "never", "required")

# Constant -> (type, default). A default of ... marks what every method must state.
CONSTANTS: dict[str, tuple[type, object]] = {
    "KIND": (str, ...),
    "TITLE": (str, None),
    "PAPER": (str, ""),
    "BIBTEX": (str, ""),
    "NOTES": (str, ""),
    "CONTROL": (bool, False),
    "RECONSTRUCTION": (bool, False),
    "TRAINS": (bool, False),
    "RECOVERY": (str, "optional"),
    "FAMILIES": (tuple, ()),
    "SPARSITIES": (tuple, ()),
    "NEEDS_CLASSES": (bool, False),
    "PUBLISHED": (dict, None),
    "CHECK": (dict, None),
}


@dataclass(frozen=True)
class Method:
    """What a method file says about itself.

    Attributes:
        kind: what its plans remove; one of KINDS.
        control: a control is a row of every table and cannot be excluded.
        reconstruction: parts of the paper were not available; the leaderboard marks the row.
        trains: trains during selection, so that its selection depends on the budget.
        recovery: "optional"; "never" for rows that are never trained; "required" for rows that
            mean nothing untrained.
        families: families it applies to; empty means all.
        sparsities: sparsities it runs at whatever the track asks, because a pattern fixes them.
        needs_classes: can't prune networks that read text.
        published: the paper's own recipe for the as-published division, None without one:
            "recovery" (a module of prunebench/recovery), "parameters" of `select` and "sparsities"
            that differ from the matched division's.
        check: parameters of `select` that make it quick, for `prunebench check`.
        parameters: keyword parameters of `select` with their defaults.
    """

    name: str
    file: Path
    idea: str
    kind: str
    title: str
    paper: str
    bibtex: str
    notes: str
    control: bool
    reconstruction: bool
    trains: bool
    recovery: str
    families: tuple[str, ...]
    sparsities: tuple[float, ...]
    needs_classes: bool
    published: Mapping[str, object] | None
    check: Mapping[str, object]
    parameters: Mapping[str, object]


def discover(folders: Iterable[Path]) -> dict[str, Method]:
    """All methods of the folders, by name.

    Raises:
        UserError: a folder is missing, a file breaks the contract, or two files share a name.
    """
    found: dict[str, Method] = {}
    for folder in map(resources.find, folders):
        if not folder.is_dir():
            raise UserError(f"the methods folder {folder} does not exist (methods.folders)")
        for file in sorted(folder.glob("*.py")):
            method = read(file)
            if method.name in found:
                raise UserError(
                    f"{file} and {found[method.name].file} are both named {method.name}"
                )
            found[method.name] = method
    return found


def read(file: Path) -> Method:
    """Read one method file as syntax and check it against the contract."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", file.stem):
        raise UserError(
            f"{file}: a method's file name is its name everywhere; use a-z, 0-9 and _ only"
        )
    try:
        tree = ast.parse(file.read_text(), filename=str(file))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{file} line {line}" if line else str(file)
        raise UserError(f"{where}: the method file is not valid Python: {error}") from None
    constants = _constants(file, tree)
    idea = (ast.get_docstring(tree) or "").split("\n")[0].strip()
    if not idea:
        raise UserError(f"{file}: a method starts with a docstring whose first line is its idea")
    constants["title"] = constants["title"] or file.stem
    constants["check"] = constants["check"] or {}
    method = Method(
        name=file.stem, file=file, idea=idea, parameters=_parameters(file, tree), **constants
    )
    check_parameters(method, method.check, f"{file}: CHECK")
    return method


def _constants(file: Path, tree: ast.Module) -> dict[str, object]:
    values = {name.lower(): default for name, (_, default) in CONSTANTS.items()}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        name = getattr(target, "id", None)
        if name in CONSTANTS:
            values[name.lower()] = _literal(file, name, node)
    missing = [name for name, (_, default) in CONSTANTS.items() if values[name.lower()] is ...]
    if missing:
        raise UserError(f"{file}: a method must state {missing[0]}, one of {', '.join(KINDS)}")
    for name, allowed in (("kind", KINDS), ("recovery", RECOVERY)):
        if values[name] not in allowed:
            raise UserError(
                f"{file}: {name.upper()} is '{values[name]}'; known: {', '.join(allowed)}"
            )
    for family in values["families"]:
        if family not in models.family_names():
            known = ", ".join(models.family_names())
            raise UserError(f"{file}: FAMILIES names '{family}'; known: {known}")
    for sparsity in values["sparsities"]:
        if not (isinstance(sparsity, float) and 0 < sparsity < 1):
            raise UserError(f"{file}: SPARSITIES has {sparsity!r}; each must be in (0, 1)")
    return values


def _literal(file: Path, name: str, node: ast.Assign) -> object:
    expected, _ = CONSTANTS[name]
    try:
        value = ast.literal_eval(node.value)
    except ValueError:
        value = None
    if not isinstance(value, expected):
        raise UserError(
            f"{file} line {node.lineno}: {name} must be a literal {expected.__name__}, because the "
            "workflow reads it without running the file"
        )
    return value


def _parameters(file: Path, tree: ast.Module) -> dict[str, object]:
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "select"]
    if not functions or not functions[0].args.args:
        raise UserError(f"{file}: a method defines select(context, parameter=default, ...) -> Plan")
    arguments = functions[0].args
    named = [argument.arg for argument in (*arguments.args[1:], *arguments.kwonlyargs)]
    defaults = [default for default in (*arguments.defaults, *arguments.kw_defaults) if default]
    if len(named) != len(defaults):
        raise UserError(f"{file}: every parameter of select but the context needs a default")
    try:
        return dict(zip(named, map(ast.literal_eval, defaults), strict=True))
    except ValueError:
        raise UserError(f"{file}: the defaults of select must be literals") from None


def check_parameters(method: Method, given: Mapping[str, object], source: str = "") -> None:
    """The values a track gives must be parameters of `select`, of the default's type."""
    for name, value in given.items():
        where = f"{source or f'methods.parameters.{method.name}'}.{name}"
        if name not in method.parameters:
            known = ", ".join(method.parameters) or "none"
            raise UserError(f"{where}: {method.file} has no such parameter; it has: {known}")
        default = method.parameters[name]
        expected = (int, float) if isinstance(default, float) else type(default)
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, expected):
            raise UserError(f"{where} is {value!r}; it must be like its default {default!r}")


def load(method: Method) -> Callable:
    """Import the file and return its `select`.

    Raises:
        CellError: the file raises while it is imported.
    """
    spec = importlib.util.spec_from_file_location(f"prunebench_method_{method.name}", method.file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a missing package, a misspelt name: this method's cells only
        raise CellError(
            f"{method.file} fails at import: {type(error).__name__}: {error}"
        ) from error
    return module.select
