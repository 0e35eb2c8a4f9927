"""From the content of a track's file to typed settings, or to one line that says what is wrong."""

import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from prunebench.errors import UserError

Section = TypeVar("Section", bound=BaseModel)
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
Text = Annotated[str, Field(min_length=1, max_length=10_000)]
Place = Annotated[str, Field(pattern=r"^[\w./@+=%-][\w ./@+=%-]*$", max_length=1000)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Images = Annotated[int, Field(ge=1, le=10**12)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]
Item = TypeVar("Item")


def _different(items: tuple) -> tuple:
    if len(set(items)) != len(items):
        raise ValueError(f"{list(items)} has an entry twice")
    return items


Some = Annotated[tuple[Item, ...], Field(min_length=1, max_length=1000), AfterValidator(_different)]
Distinct = Annotated[tuple[Item, ...], Field(max_length=1000), AfterValidator(_different)]
# Sparsities stand in paths, and Python prints 0.00009 as 9e-05.
LEAST_SPARSITY, MOST_SPARSITY = 0.0001, 0.9999
Fraction = Annotated[float, Field(ge=LEAST_SPARSITY, le=MOST_SPARSITY)]
ORDER = {"extra_forbidden": 0, "missing": 1}  # of errors: which is shown first
WORDS = {True: "yes", False: "no"}


def plain(section: BaseModel) -> dict:
    """A section as plain values, defaults included, as records hold it."""
    return section.model_dump(mode="json", exclude_none=True)


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" where a known name is near, and the known names."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"{f'; did you mean {near[0]!r}?' if near else ''}; known: {', '.join(known) or 'none'}"


def one_line(text: object, most: int = 400) -> str:
    """A text that may hold anything as one line of printable letters."""
    words = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)
    return line if len(line) <= most else f"{line[:most]}..."


def shown(value: object) -> str:
    """A wrong value, as a message quotes it."""
    kinds = {dict: "a mapping", list: "a list", tuple: "a list"}
    return kinds.get(type(value)) or one_line(repr(value), 80)


def parse(kind: type[Section], content: object, file: Path | str, *place: str) -> Section:
    """The section that a file's content makes.

    Args:
        content: what YAML gives: mappings with text for keys, lists, text, numbers, None.
        place: the keys below which the section stands in the file; none for the whole file.

    Raises:
        UserError: a key is unknown, missing or wrong; one line that names the first such key.
    """
    try:
        return kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        path, said = _first(kind, error, content)
        key = ".".join([*place, *path]) or "the file"
        raise UserError(f"{file}: {one_line(f'{key}: {said}', 1000)}") from None


def _first(kind: type[BaseModel], error: ValidationError, content: object) -> tuple[list, str]:
    """Path and words of the error to show: unknown keys first, a misspelt one is missing too."""
    errors = error.errors(include_url=False)
    errors.sort(key=lambda e: (ORDER.get(e["type"], 2), -len(_path(e["loc"], content))))
    first = errors[0]
    path, cause = _path(first["loc"], content), first.get("ctx", {}).get("error")
    if first["loc"] and first["loc"][-1] in _absent(kind, path, content):
        path.append(first["loc"][-1])
    if first["type"] == "extra_forbidden":
        return path, f"unknown key{nearest(path[-1], _section(kind, path[:-1], content)[0])}"
    if first["type"] == "missing":
        return path, "this key is missing"
    if first["type"].startswith("union_tag"):
        return [*path, "name"], _of_union(first)
    if cause is not None:
        key = getattr(cause, "key", "")
        return [*path, key] if key else path, str(cause)
    said = first["msg"].partition(" ")[2].replace("valid string", "text")  # without "Input"
    said = said.replace("an object", "a mapping").replace("valid dictionary", "mapping")
    return path, f"{shown(first['input'])} {said}{_hint(first)}"


def _of_union(error: Mapping) -> str:
    entry = error["input"]
    known = str(error.get("ctx", {}).get("expected_tags", "")).replace("'", "").split(", ")
    if not isinstance(entry, Mapping):
        return f"{shown(entry)} should be a mapping"
    if "name" not in entry:
        return "this key is missing"
    return f"unknown name {shown(entry['name'])}{nearest(entry['name'], known)}"


def _hint(error: Mapping) -> str:
    """What YAML made of a value that looks right."""
    value, kind = error["input"], error["type"]
    if kind in ("string_type", "literal_error") and isinstance(value, bool | int | float):
        word = f"{WORDS[value]} and the like as booleans" if value in (True, False) else "it so"
        return f"; YAML reads {word}: quote it"
    if kind in ("float_type", "int_type") and isinstance(value, str):
        return _number(value)
    if kind == "literal_error":
        known = str(error["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(str(value), known, n=1)
        return f"; did you mean {near[0]!r}?" if near else ""
    return ""


def _number(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return ""
    if "e" not in text.lower():
        return f"; leave out the quotes: {text}"
    mantissa, _, exponent = f"{value:e}".partition("e")
    digits = mantissa.rstrip("0")
    plain = f"{digits}{'0' if digits.endswith('.') else ''}e{int(exponent):+d}"
    return f"; YAML reads {text} as text: write {plain}"


def _path(location: tuple, content: object) -> list[str]:
    """The dotted path without what pydantic adds to it, such as the member of a union."""
    path = []
    for step in location:
        inside = isinstance(content, list) and isinstance(step, int) and step < len(content)
        if inside or (isinstance(content, Mapping) and step in content):
            content = content[step]
            path.append(str(step))
    return path


def _section(kind: object, path: list[str], content: object) -> tuple[dict, object]:
    """The fields of what stands at a path, {} where it is no section, and its content."""
    for step in path:
        kind = _below(kind, step, content)
        if kind is None:
            return {}, content
        content = content[int(step) if isinstance(content, list) else step]
    return getattr(_member(kind, content), "model_fields", {}), content


def _absent(kind: object, path: list[str], content: object) -> set[str]:
    """The keys that the section at a path has not: their defaults may not fit the others."""
    fields, section = _section(kind, path, content)
    return set(fields) - set(section) if isinstance(section, Mapping) else set()


def _below(kind: object, step: str, content: object) -> object:
    kind = _member(kind, content)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(step)
        return field and field.annotation
    inner = typing.get_args(kind)
    return inner[1 if typing.get_origin(kind) is dict else 0] if inner else None


def _member(kind: object, content: object) -> object:
    """What is behind an annotation: of a union the section that the content means."""
    while typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind
    found = [_member(k, content) for k in typing.get_args(kind) if k is not type(None)]
    named = content.get("name") if isinstance(content, Mapping) else None
    sections = [k for k in found if isinstance(k, type) and issubclass(k, BaseModel)]
    for section in sections:
        field = section.model_fields.get("name")
        if field and named in typing.get_args(field.annotation):
            return section
    return (sections or found)[0]
