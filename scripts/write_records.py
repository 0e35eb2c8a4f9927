"""Write docs/records.md and the JSON schemas in docs/schemas/ out of prunebench/records.

    python scripts/write_records.py

A test checks that they agree.
"""

import json
import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.types import StringConstraints
from pydantic_core import PydanticUndefined

from prunebench.records import parts, schema

DOCS = Path(__file__).parents[1] / "docs"
MARKS = (FieldInfo, StringConstraints)  # what Annotated adds to a type
HEAD = """# Records

Written by `scripts/write_records.py` out of `prunebench/records/`; do not edit.

Every stage ends by writing one JSON record, version {version}. It is sealed: `checksum` is the
SHA-256 of everything else in it, `files` holds those of the payload beside it, `inputs` those of
what it was made from, and `identity` says which result it is. Whatever reads a record checks all of
this and refuses, by name, one that was changed, copied into another's place, or made from something
else than what is there. Unknown keys, other types, NaN and infinity are refused too.

Records of schema 1 (those under `results/` are of it until they are made anew) had no identity,
inputs or checksum. `prunebench/records/upgrade.py` reads them for leaderboards; the stages refuse
them. JSON schemas for editors and other programs are in [schemas](schemas).
"""
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null",
         typing.Any: "any JSON"}  # fmt: skip


def words(kind: object) -> str:
    """A type as it is printed."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(json.dumps(value) for value in inner)
    told = [words(one) for one in inner if one is not Ellipsis and not isinstance(one, MARKS)]
    if origin is typing.Annotated:
        return told[0]
    if origin is tuple and Ellipsis in inner:
        return f"list of {told[0]}"
    between = {dict: " → ", tuple: " and ", typing.Union: " or ", types.UnionType: " or "}
    unique = told if origin is tuple else dict.fromkeys(told)
    return between[origin].join(unique) if origin else NAMES[kind]


def section(kind: type[BaseModel], known: set[str] = frozenset()) -> str:
    """A type's fields as a Markdown table, without those in `known`."""
    text = " ".join((kind.__doc__ or "").split())
    lines = [f"### {kind.__name__}", "", text, "", "| key | type | what |", "|---|---|---|"]
    for name, field in kind.model_fields.items():
        if name not in known:
            optional = field.default is not PydanticUndefined or field.default_factory
            told = " ".join((field.description or "").split())
            about = words(field.annotation) + (" (optional)" if optional else "")
            lines.append(f"| `{name}` | {about} | {told} |".replace("->", "→"))
    return "\n".join(lines)


def page() -> str:
    base = set(schema.Record.model_fields)
    kinds = [schema.RECORDS[name] for name in schema.RECORDS] + [schema.Failed, schema.Checkpoint]
    blocks = [HEAD.format(version=schema.VERSION), "## All records", section(schema.Record)]
    blocks += ["## By stage", *(section(kind, base - {"identity"}) for kind in kinds)]
    own = [kind for module in (parts, schema) for kind in vars(module).values()
           if isinstance(kind, type) and issubclass(kind, parts.Part)]  # fmt: skip
    shown = {*kinds, schema.Record, schema.Done, schema.Sealed, parts.Part}
    left = [kind for kind in dict.fromkeys(own) if kind not in shown]
    return "\n\n".join([*blocks, "## Parts", *map(section, left)]).replace("\n\n\n", "\n\n") + "\n"


def written() -> dict[Path, str]:
    """Every file as it should read."""
    pages = {DOCS / "records.md": page()}
    for name, kind in schema.RECORDS.items():
        text = json.dumps(kind.model_json_schema(), indent=1)
        pages[DOCS / "schemas" / f"{name}.json"] = f"{text}\n"
    return pages


def main() -> None:
    for file, text in written().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)


if __name__ == "__main__":
    main()
