"""Reading the YAML of tracks, with everything refused that YAML would take in another sense.

A second key of one name, a key or a number that YAML turns into something else, a value that is no
number (NaN), a date, an anchor that refers to itself and aliases that multiply are named with their
place; none reaches the settings.
"""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from prunebench.errors import UserError
from prunebench.runtime import resources
from prunebench.tracks.settings import nearest, one_line, shown

FOLDER = Path("config")
OWNER = "track"  # in a track's folder of runs/: the file it belongs to
MOST_BYTES, MOST_VALUES, DEEPEST = 1_000_000, 100_000, 50
ODD_NUMBER = re.compile(r"[-+]?0[0-7_]+|.*:.*")  # octal and sexagesimal in YAML 1.1
# What PyYAML raises where a tag does not fit its value, or nodes contain themselves.
BROKEN = (ValueError, TypeError, AttributeError, OverflowError, RecursionError)


def read(name: str) -> tuple[Path, object]:
    """The file of a track and its content, whose values are not checked.

    Raises:
        UserError: there is no such file, it can't be read, or its YAML is not what it looks like.
    """
    file = _found(name)
    content = _parsed(file)
    if isinstance(content, dict) and "base" in content:
        base = _base(file, content.pop("base"))
        content = _merged(_parsed(base), content)
    return file, content


def names() -> list[str]:
    """The tracks in `config/`, and those that are shipped."""
    return sorted(path.stem for path in resources.listed(f"{FOLDER}/*.yaml"))


def _found(name: str) -> Path:
    name = str(name)
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    _check_place(file)
    file = resources.find(file)
    if not file.exists():
        known = nearest(name, names()).replace("; known:", "; known tracks:")
        raise UserError(f"unknown track {name!r}: {file} does not exist{known}")
    if not file.is_file():
        raise UserError(f"{file} is not a file; a track is a YAML file")
    own = resources.find(FOLDER / f"{file.stem}.yaml")
    if own.exists() and not own.samefile(file):
        raise UserError(
            f"{file} and {own} would share runs/{file.stem} and results/{file.stem}, which are "
            "called like the file; rename one of them"
        )
    return file


def claim(name: str, folder: Path | str) -> None:
    """Note that a track's artefacts are in a folder, which another file of that name may have.

    Raises:
        UserError: the folder is another file's, which is still there.
    """
    file, note = _found(name).resolve(), Path(folder) / OWNER
    own = str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)
    before = note.read_text().strip() if note.exists() else own
    if before != own and Path(before).exists():
        raise UserError(
            f"{name}: {folder} holds what was made of {before}, a track of the same name; rename "
            f"one of them, or delete {note} if they are one track"
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(f"{own}\n")


def _check_place(file: Path) -> None:
    """A track's path stands in commands, which quote it, and its name in paths."""
    if odd := next((c for c in str(file) if c in "{}" or not c.isprintable()), ""):
        raise UserError(f"{one_line(file)}: a track's path has {odd!r}; rename it")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", file.stem):
        raise UserError(
            f"{file}: a track's file name is its folder; use up to 100 letters, digits, _ . -"
        )


def _base(file: Path, name: object) -> Path:
    if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name, re.ASCII)):
        raise UserError(f"{file}: base: {shown(name)} is no name of a track beside this one")
    base = file.with_name(f"{name}.yaml")
    if not base.is_file():
        known = nearest(name, sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise UserError(f"{file}: base: {base} does not exist{known}")
    return base


def _parsed(file: Path) -> object:
    text = _text(file)
    try:
        _check_shape(file, text)
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, *BROKEN) as error:
        said = str(error).replace('in "<unicode string>", ', "at ")
        raise UserError(f"{file} is not valid YAML: {one_line(said)}") from None
    _check_values(file, content)
    return content


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"{file}: more than {MOST_BYTES} bytes; is it a track?")
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text (UTF-16?); save it as UTF-8") from None


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML's own types, without what a reader would not expect of them."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what `<<` names; nothing of it twice, or merges of merges would multiply."""
        checked = vars(self).setdefault("_checked", set())
        if id(node) not in checked:
            checked.add(id(node))
            _check_keys(node)
        super().flatten_mapping(node)
        node.value = list({key.value: (key, value) for key, value in node.value}.values())

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if ODD_NUMBER.fullmatch(node.value):
            raise _odd(node, f"YAML reads {node.value} as another number: write it plainly")
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise _odd(key, f"the key {shown(key.value)} is no text to YAML: quote it")
        if key.value in seen:
            raise _odd(key, f"the key {key.value!r} stands there twice")
        seen.add(key.value)


def _odd(node: yaml.Node, message: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, message, node.start_mark)


def _check_shape(file: Path, text: str) -> None:
    """Depth, before anything is built that recurses over it."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise UserError(f"{file}: more than {DEEPEST} levels of nesting")


def _check_values(file: Path, content: object) -> None:
    """Only text, whole and real numbers, booleans and nothing, in a tree of sensible size."""
    left = MOST_VALUES
    places: list[tuple[object, tuple]] = [(content, ())]
    while places:
        value, path = places.pop()
        left -= 1
        if left < 0 or len(path) > DEEPEST:
            raise UserError(
                f"{file}: aliases (*name) that refer to themselves or multiply beyond "
                f"{MOST_VALUES} values"
            )
        if isinstance(value, Mapping):
            places += [(below, (*path, key)) for key, below in value.items()]
        elif isinstance(value, list):
            places += [(below, (*path, index)) for index, below in enumerate(value)]
        else:
            _check_value(f"{file}: {'.'.join(map(str, path)) or 'the file'}", value)


def _check_value(where: str, value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is no number to work with")
    if isinstance(value, int) and abs(value) > 10**18:
        raise UserError(f"{where}: the number is beyond 10^18")
    if not isinstance(value, str | int | float | None):
        kind = type(value).__name__
        raise UserError(f"{where}: YAML reads a {kind}; quote it if it is meant as text")
    if isinstance(value, str) and not _printable(value):
        raise UserError(f"{where}: the text has control characters or broken letters")


@functools.cache
def _printable(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in text)


def _merged(base: object, changes: object) -> object:
    """`base` with the keys of `changes`, mappings in depth; anything else is replaced."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return {**base, **{key: _merged(base.get(key), value) for key, value in changes.items()}}
