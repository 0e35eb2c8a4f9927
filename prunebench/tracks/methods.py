"""Discovery of method files. Metadata are literals and are read without running the file.

A method file holds a docstring, whose first line is the idea, literal constants and
`select(context, ...)`. Reading it as syntax only lets the workflow plan without importing torch and
finds a broken file before anything runs. A broken file costs its own method only: the others go on,
whatever an editor leaves in a folder. `docs/add_a_method.md` explains the contract.
"""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prunebench import models
from prunebench import recovery as recoveries
from prunebench.errors import CellError, UserError
from prunebench.runtime import resources
from prunebench.runtime.syntax import keyword_defaults
from prunebench.tracks.settings import LEAST_SPARSITY, MOST_SPARSITY, nearest, one_line

PARTS = ("layers", "widths", "weights", "steps")  # what a plan may remove, several at once
KINDS = ("none", *PARTS)
RECOVERY = ("optional", "never", "required")
UPDATES = ("", "closed form")
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")  # of a method, everywhere
MOST_BYTES = 1_000_000  # of a method file
MOST = 10**9  # of a parameter's value
# What Python's parser raises for files that are not Python, half-written or out of the ordinary.
UNREADABLE = (SyntaxError, ValueError, OSError, RecursionError, MemoryError)

# Constant -> (type, default). A default of ... marks what every method must state.
CONSTANTS: dict[str, tuple[type | tuple[type, ...], object]] = {
    "KIND": ((str, tuple), ...),
    "TITLE": (str, None),
    "PAPER": (str, ""),
    "BIBTEX": (str, ""),
    "NOTES": (str, ""),
    "CONTROL": (bool, False),
    "RECONSTRUCTION": (bool, False),
    "FAITHFUL_TO": (str, ""),
    "GUESSED": (str, ""),
    "TRAINS": (bool, False),
    "UPDATES": (str, ""),
    "RECOVERY": (str, "optional"),
    "FAMILIES": (tuple, ()),
    "SPARSITIES": (tuple, ()),
    "NEEDS_CLASSES": (bool, False),
    "RECIPE": (dict, None),
    "CHECK": (dict, None),
    "STEPS": (float, None),
    "VARIANTS": (dict, None),
}


@dataclass(frozen=True)
class Method:
    """What a method file says about itself.

    Attributes:
        kind: what its plans remove: one of KINDS, or several parts joined by "+".
        control: a control is a row of every table and cannot be excluded.
        reconstruction: parts of the paper were not available; the leaderboard marks the row.
        faithful_to: what it was written from and is held to, for the README's table of systems.
        guessed: what is assumed of the criterion where that itself was not available, "" where it
            was; such a row is not ranked, and its paper not cited for it.
        trains: trains during selection, so that its selection depends on the budget.
        updates: "closed form" where it changes weights under pruning without training them: solved
            for from activations, at the price of forward passes alone.
        recovery: "optional"; "never" for rows that are never trained; "required" for rows that
            mean nothing untrained.
        families: families it applies to; empty means all.
        sparsities: sparsities it runs at whatever the track asks, because a pattern fixes them.
        needs_classes: can't prune networks that read text.
        recipe: the paper's own for the as-published division, None without one:
            "recovery" (a module of prunebench/recovery), "parameters" of `select` and "sparsities"
            that differ from the matched division's.
        check: parameters of `select` that make it quick, for `prunebench check`.
        steps: the share of the sampling steps that its plans keep beside what else they remove;
            None where steps are all that they remove, or no part of it.
        parameters: keyword parameters of `select` with their defaults, or the variant's values.
        given: of these, what a variant calls `select` with.
        variants: further rows of the same file.
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
    faithful_to: str
    guessed: str
    trains: bool
    updates: str
    recovery: str
    families: tuple[str, ...]
    sparsities: tuple[float, ...]
    needs_classes: bool
    recipe: Mapping[str, object] | None
    check: Mapping[str, object]
    steps: float | None
    parameters: Mapping[str, object]
    given: Mapping[str, object] = field(default_factory=dict)
    variants: tuple["Method", ...] = ()

    @property
    def rows(self) -> tuple["Method", ...]:
        """The method and its variants."""
        return (self, *self.variants)


@dataclass
class Found:
    """What lies in the folders of methods.

    Attributes:
        methods: by name.
        broken: name of a method -> what is wrong with its file.
        strays: files that no method can be in, as editors and file managers leave them.
    """

    methods: dict[str, Method] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """One line for each file that is left out."""
        strays = [f"{file} is no method: its name is no name of one" for file in self.strays]
        return [*self.broken.values(), *strays]


def discover(folders: Iterable[Path | str]) -> Found:
    """All methods of the folders. Files that begin with a dot are passed over.

    Raises:
        UserError: a folder is missing, or two files share a name.
    """
    found = Found()
    for folder in map(resources.find, folders):
        if not folder.is_dir():
            raise UserError(f"the methods folder {folder} does not exist")
        for file in sorted(folder.glob("[!.]*.py")):
            _take(found, file)
    return found


def _take(found: Found, file: Path) -> None:
    if not file.stem.isidentifier():
        found.strays.append(one_line(file))
        return
    try:
        rows = _known(file, file.stat().st_mtime_ns).rows
    except (UserError, OSError) as error:
        _check_name(found, file, file.stem)
        found.broken[file.stem] = str(error)
        return
    for method in rows:
        _check_name(found, file, method.name)
        found.methods[method.name] = method


def _check_name(found: Found, file: Path, name: str) -> None:
    if name in found.methods:
        raise UserError(f"{file} and {found.methods[name].file} are both named {name}")


@functools.lru_cache(maxsize=1000)
def _known(file: Path, changed_ns: int) -> Method:
    """As `read`; a process that reads several tracks reads a file that is as it was once."""
    return read(file)


def read(file: Path) -> Method:
    """Read one method file, with its variants, as syntax and check it against the contract.

    Raises:
        UserError: what breaks it, in one line with the file's name.
    """
    if not NAME.fullmatch(file.stem):
        name = one_line(file)
        raise UserError(
            f"{name}: a method's file name is its name everywhere; use a-z, 0-9 and _ only"
        )
    tree = _parsed(file)
    constants = _constants(file, tree)
    idea = (ast.get_docstring(tree) or "").split("\n")[0].strip()
    if not idea:
        raise UserError(f"{file}: a method starts with a docstring whose first line is its idea")
    constants["title"] = constants["title"] or file.stem
    constants["check"] = constants["check"] or {}
    constants["kind"] = _kind(str(file), constants["kind"])
    variants = constants.pop("variants") or {}
    method = Method(
        name=file.stem, file=file, idea=idea, parameters=_parameters(file, tree), **constants
    )
    _check_method(method, str(file))
    others = [_variant(method, name, changes) for name, changes in variants.items()]
    return dataclasses.replace(method, variants=tuple(others))


def _check_method(method: Method, where: str) -> None:
    """What its constants say together."""
    _check_values(method, where)
    _check_recipe(method, f"{where}: RECIPE")
    check_parameters(method, method.check, f"{where}: CHECK")
    if method.guessed and method.bibtex:
        raise UserError(
            f"{where}: GUESSED and BIBTEX: no paper is cited for a criterion that is a guess; take "
            "BIBTEX out (PAPER may stay)"
        )


def _variant(method: Method, name: object, changes: object) -> Method:
    """Another row of a method's file: other constants, and other parameters of `select`.

    Raises:
        UserError: the entry of VARIANTS breaks the contract.
    """
    where = f"{method.file}: VARIANTS {name}"
    if not (isinstance(name, str) and NAME.fullmatch(full := f"{method.name}_{name}")):
        raise UserError(f"{where}: a variant's name is part of its row's; use a-z, 0-9 and _ only")
    known = {key: kind for key, (kind, _) in CONSTANTS.items() if key != "VARIANTS"}
    known["parameters"] = dict
    if not isinstance(changes, dict):
        raise UserError(f"{where} is {changes!r}; it must be a dict of constants")
    for key, value in changes.items():
        if key not in known:
            raise UserError(f"{where} has {key!r}{nearest(key, known)}")
        if not isinstance(value, known[key]):
            raise UserError(f"{where} {key} is {value!r}, not a {_named(known[key])}")
    given = changes.get("parameters", {})
    check_parameters(method, given, where)
    own = {
        "name": full,
        "title": f"{method.title}: {name}",
        **{key.lower(): value for key, value in changes.items() if key != "parameters"},
        "parameters": {**method.parameters, **given},
        "check": {**given, **changes.get("CHECK", method.check)},
        "given": given,
    }
    own["kind"] = _kind(where, own.get("kind", method.kind))
    variant = dataclasses.replace(method, **own)
    _check_method(variant, where)
    return variant


def _parsed(file: Path) -> ast.Module:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"{file}: more than {MOST_BYTES} bytes; is it a method?")
        return ast.parse(file.read_text(), filename=str(file))
    except UNREADABLE as error:
        line = getattr(error, "lineno", None)
        where = f"{file} line {line}" if line else str(file)
        said = one_line(error)
        raise UserError(f"{where}: the method file is not valid Python: {said}") from None


def _constants(file: Path, tree: ast.Module) -> dict[str, object]:
    values = {name.lower(): default for name, (_, default) in CONSTANTS.items()}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        name = getattr(target, "id", "")
        if name in CONSTANTS:
            values[name.lower()] = _literal(file, name, node)
        elif near := _misspelt(name):
            raise UserError(f"{file} line {node.lineno}: {name}: did you mean {near}?")
    missing = [name for name, (_, default) in CONSTANTS.items() if values[name.lower()] is ...]
    if missing:
        raise UserError(f"{file}: a method must state {missing[0]}, one of {', '.join(KINDS)}")
    return values


def _check_values(method: Method, where: str) -> None:
    """Each constant is one of those that it may be."""
    for name, allowed in (("recovery", RECOVERY), ("updates", UPDATES)):
        if (value := getattr(method, name)) not in allowed:
            known = ", ".join(filter(None, allowed))
            raise UserError(f"{where}: {name.upper()} is '{value}'; known: {known}")
    _check_steps(method, where)
    for family in method.families:
        if family not in models.family_names():
            known = ", ".join(models.family_names())
            raise UserError(f"{where}: FAMILIES names {family!r}; known: {known}")
    _check_sparsities(f"{where}: SPARSITIES", method.sparsities)


def _kind(where: str, given: str | tuple) -> str:
    """The kind of a method: one of KINDS, or several parts, in the order of PARTS."""
    parts = tuple(given.split("+")) if isinstance(given, str) else given
    if parts == ("none",):
        return "none"
    for part in parts:
        if part not in PARTS or parts.count(part) > 1:
            raise UserError(f"{where}: KIND is {given!r}; known: {', '.join(KINDS)}, or a tuple of "
                            f"different ones of {', '.join(PARTS)}")  # fmt: skip
    if not parts:
        raise UserError(f"{where}: KIND is (); what removes nothing is of the kind 'none'")
    return "+".join(part for part in PARTS if part in parts)


def _check_steps(method: Method, where: str) -> None:
    """A share of steps is stated where it is one of several parts, and only there."""
    parts = method.kind.split("+")
    wanted = len(parts) > 1 and "steps" in parts
    if wanted and method.steps is None:
        raise UserError(
            f"{where}: a method of the kind '{method.kind}' needs STEPS, the share of the sampling "
            "steps that stays; its sparsity is of the parameters"
        )
    if method.steps is not None and not (wanted and 0 < method.steps < 1):
        raise UserError(
            f"{where}: STEPS is {method.steps!r}; it is a number between 0 and 1, of methods that "
            "remove steps and more"
        )


def _misspelt(name: str) -> str:
    """The constant that a name in capitals is nearly; "" if it is a method's own."""
    if not name.isupper():
        return ""
    near = difflib.get_close_matches(name, CONSTANTS, n=1, cutoff=0.75)
    return near[0] if near else ""


def _check_sparsities(what: str, given: Iterable[object]) -> None:
    for sparsity in given:
        if not (isinstance(sparsity, float) and LEAST_SPARSITY <= sparsity <= MOST_SPARSITY):
            raise UserError(
                f"{what} has {sparsity!r}; each must be in (0, 1), from {LEAST_SPARSITY} to "
                f"{MOST_SPARSITY}"
            )


def _check_recipe(method: Method, where: str) -> None:
    """A recipe names a recovery that exists and parameters that `select` has."""
    recipe = method.recipe or {}
    known = {"recovery": str, "parameters": dict, "sparsities": tuple}
    for key, value in recipe.items():
        if key not in known:
            raise UserError(f"{where} has {key!r}{nearest(key, known)}")
        if not isinstance(value, known[key]):
            raise UserError(f"{where} {key} is {value!r}, not a {known[key].__name__}")
    named, names = recipe.get("recovery", "finetune"), recoveries.recovery_names()
    if named not in names:
        raise UserError(f"{where} names the recovery {named!r}{nearest(named, names)}")
    _check_sparsities(f"{where} sparsities", recipe.get("sparsities", ()))
    check_parameters(method, recipe.get("parameters", {}), where)


def _literal(file: Path, name: str, node: ast.Assign) -> object:
    expected, _ = CONSTANTS[name]
    try:
        value = ast.literal_eval(node.value)
    except (*UNREADABLE, TypeError):
        value = None
    if not isinstance(value, expected):
        raise UserError(
            f"{file} line {node.lineno}: {name} must be a literal {_named(expected)}, because the "
            "workflow reads it without running the file"
        )
    return value


def _named(expected: type | tuple[type, ...]) -> str:
    kinds = expected if isinstance(expected, tuple) else (expected,)
    return " or ".join(kind.__name__ for kind in kinds)


def _parameters(file: Path, tree: ast.Module) -> dict[str, object]:
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "select"]
    if not functions or not functions[0].args.args:
        raise UserError(f"{file}: a method defines select(context, parameter=default, ...) -> Plan")
    if (defaults := keyword_defaults(functions[0])) is None:
        raise UserError(f"{file}: every parameter of select but the context needs a default")
    try:
        return {name: ast.literal_eval(default) for name, default in defaults.items()}
    except (*UNREADABLE, TypeError):
        raise UserError(f"{file}: the defaults of select must be literals") from None


def check_parameters(
    method: Method | recoveries.Entry, given: Mapping[str, object], source: str = ""
) -> None:
    """The values a track gives must be parameters of `select`, of the default's type and sign.
    What holds for methods holds for the recoveries' `loss` too.

    A count whose default is more than 1 must be at least 1, a number whose default lies between 0
    and 1 must be from 0 to 1, and one whose default is not negative must not be negative.
    """
    for name, value in given.items():
        where = f"{source or f'methods.parameters.{method.name}'}.{name}"
        if name not in method.parameters:
            known = ", ".join(method.parameters) or "none"
            near = difflib.get_close_matches(str(name), method.parameters, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where}: {method.file} has no such parameter{meant}; it has: {known}")
        default = method.parameters[name]
        expected = (int, float) if isinstance(default, float) else type(default)
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, expected):
            raise UserError(f"{where} is {value!r}; it must be like its default {default!r}")
        if isinstance(default, int | float):
            least, most = _range(default)
            if not least <= value <= most:
                raise UserError(
                    f"{where} is {value!r}; it must be from {least} to {most}, as its default is "
                    f"{default!r}"
                )


def _range(default: float) -> tuple[float, float]:
    """What a parameter may be, by its default."""
    if default < 0:
        return -MOST, MOST
    if isinstance(default, int):
        return (1 if default > 1 else 0), MOST
    return 0, (1 if 0 < default < 1 else MOST)


def load(method: Method) -> Callable:
    """Import the file and return its `select`.

    Raises:
        CellError: the file raises while it is imported.
    """
    spec = importlib.util.spec_from_file_location(f"prunebench_method_{method.name}", method.file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a missing package: this method's cells only
        raise CellError(
            f"{method.file} fails at import: {type(error).__name__}: {error}"
        ) from error
    return module.select
