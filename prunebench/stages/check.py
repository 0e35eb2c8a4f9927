"""`prunebench check FILE...`: the contract of methods, tried on tiny networks."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prunebench.errors import CellError, UserError
from prunebench.selection import contract, tiny
from prunebench.selection.contract import Finding
from prunebench.tracks import methods

READ = "the file says what it is in literals, and can be imported"


def check(files: Iterable[Path], write: Callable[[str], object]) -> bool:
    """Write one line per rule for every method and variant; whether all keep all rules."""
    kept = True
    for file in files:
        for line, fine in _lines(Path(file)):
            write(f"{line}\n")
            kept = kept and fine
    return kept


def _lines(file: Path) -> Iterator[tuple[str, bool]]:
    """A heading, and a line per rule with whether the rule is kept."""
    try:
        if not file.is_file():
            raise UserError(f"{file} does not exist")
        method = methods.read(file)
        function = methods.load(method)
    except (CellError, UserError) as error:
        yield f"{file}", True
        yield _line(Finding(READ, (), ("",), str(error))), False
        return
    for row in method.rows:
        names = contract.instances(row)
        families = {tiny.INSTANCES[name].family for name in names}
        variant = f" {row.name}" if row is not method else ""
        where = ", ".join(sorted(families))
        yield f"{file}{variant}: {len(names)} tiny networks of {where}", True
        yield _line(Finding(READ, tuple(names))), True
        for finding in contract.examine(row, function, names):
            yield _line(finding), not finding.problem


def _line(finding: Finding) -> str:
    if finding.problem:
        first, *others = finding.broken
        more = f" and {len(others)} more" if others else ""
        where = f" on {first}{more}" if first else ""
        return f"  wrong      {finding.rule}{where}: {' '.join(finding.problem.split())}"
    return f"  {'ok   ' if finding.tried else 'not tried'}".ljust(13) + finding.rule
