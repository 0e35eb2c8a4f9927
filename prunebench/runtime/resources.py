"""Where the files lie that the suite ships besides its code: tracks, methods, rules, profiles.

They stand at the root of the repository, where users read and copy them. A wheel holds copies,
which `hatch_build.py` puts below `prunebench/shipped`.
"""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SHIPPED = "shipped"  # folder of a wheel's copies, inside of the package


def root(package: Path = PACKAGE) -> Path:
    """The folder that holds `Snakefile`, `config`, `methods`, `workflow` and the profiles."""
    copies = package / SHIPPED
    return copies if copies.is_dir() else package.parent


def find(path: str | Path) -> Path:
    """`path` itself where it exists, else the file or folder that is shipped under its name.

    So whatever a user has in the current folder goes before what is shipped. Where neither exists,
    the answer is `path`: the caller's message then names what was asked for.
    """
    shipped = root() / path
    return shipped if shipped.exists() and not Path(path).exists() else Path(path)


def listed(pattern: str) -> list[Path]:
    """Files of the current folder and shipped ones that match, the former before a namesake."""
    found = {file.relative_to(root()): file for file in root().glob(pattern)}
    found |= {file: file for file in Path().glob(pattern)}
    return [found[name] for name in sorted(found)]
