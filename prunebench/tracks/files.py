"""Reading the YAML of tracks."""

import re
from pathlib import Path

import yaml

from prunebench.errors import UserError
from prunebench.runtime import resources


def read(name: str) -> tuple[Path, object]:
    """The file of a track and its content, unchecked."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else resources.find(f"config/{name}.yaml")
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in resources.listed("config/*.yaml")))
        raise UserError(f"unknown track '{name}': {file} does not exist; known tracks: {known}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", file.stem, re.ASCII):
        raise UserError(f"{file}: a track's file name is its folder; use letters, digits, _ . -")
    content = _parsed(file)
    if isinstance(content, dict) and "base" in content:
        base = file.with_name(f"{content.pop('base')}.yaml")
        if not base.exists():
            raise UserError(f"{file}: base: {base} does not exist")
        content = _merged(_parsed(base), content)
    return file, content


def _parsed(file: Path) -> object:
    try:
        return yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from None


def _merged(base: object, changes: object) -> object:
    """`base` with the keys of `changes`, mappings in depth; anything else is replaced."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return {**base, **{key: _merged(base.get(key), value) for key, value in changes.items()}}
