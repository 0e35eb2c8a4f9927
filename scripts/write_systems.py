"""Write the README's table of systems: what is implemented, after what source, and ranked where.

    python scripts/write_systems.py

A system is what a paper proposes; its parts are methods, recoveries and stages of the suite, found
by the name of their file. All that the table says of a part is read from that file's constants, so
one that is missing is not implemented and one that arrives fills its row. A test checks that the
README agrees.
"""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prunebench.tracks import methods

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MARKS = r"(<!-- systems: written by scripts/write_systems\.py -->\n).*?(<!-- end of systems -->)"
FOLDERS = {
    "method": ROOT / "methods",
    "recovery": ROOT / "prunebench" / "recovery",
    "stage": ROOT / "prunebench" / "stages",
}
HEAD = (
    "| system | part | implemented | faithful to | reconstruction | families | ranked |",
    "|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Component:
    """A part of a system.

    Attributes:
        kind: a key of FOLDERS.
        files: names of its files there without `.py`; with *, all that match.
        what: what the paper calls it.
        guess: why these files, written after another system's text, are taken for it; "" where
            they were written after its own.
    """

    kind: str
    files: tuple[str, ...]
    what: str
    guess: str = ""


def _part(what: str, *files: str, kind: str = "method", guess: str = "") -> Component:
    return Component(kind, files, what, guess)


def _recovery(what: str, *files: str, guess: str = "") -> Component:
    return _part(what, *files, kind="recovery", guess=guess)


# The systems of the field's list, in its order.
SYSTEMS = {
    "EntPruner": (_part("selection in stages", "entpruner*"),),
    "Diff-Pruning": (_part("selection", "diff_pruning"), _part("Taylor baseline", "taylor")),
    "Gradient flow": (_part("selection in rounds", "gradient_flow*"),),
    "SparseDM": (_part("training under masks", "sparsedm*"),),
    "LAPTOP-Diff": (
        _part("selection", "laptop_diff*"),
        _recovery("normalised distillation", "normalised_kd"),
    ),
    "EcoDiff": (_part("learned masks", "ecodiff*"),),
    "SnapFusion": (
        _part("A: architecture evolution", "snapfusion*"),
        _part("B: half-width decoder", "decoder", kind="stage"),
        _recovery("C: velocity prediction", "velocity"),
        _recovery("C: step distillation", "step_kd", "cfg_step_kd"),
    ),
    "ITSD": (
        _part("sensitivity pruning", "itsd*"),
        _recovery("CFG-aware distillation", "cfg_kd"),
        _recovery(
            "CFG-aware step distillation", "cfg_step_kd", guess="abstract; its form is SnapFusion's"
        ),
    ),
    "BK-SDM": (
        _part("block patterns", "bk_sdm*"),
        _recovery("output distillation", "output_kd"),
        _recovery("feature distillation", "feature_kd"),
    ),
    "TinyFusion": (
        _part("learned layer sampling", "tinyfusion*"),
        _recovery("masked distillation", "masked_kd"),
    ),
    "ShortGPT": (_part("selection", "short_gpt*"),),
    "Flux-lite": (_part("block MSE", "flux_lite*"),),
    "Sensitivity": (_part("selection", "sensitivity*"),),
    "OBS-Diff": (_part("selection and weight update", "obs_diff*"),),
    "Wanda": (_part("selection", "wanda*"),),
    "2ndMatch": (_recovery("Jacobian matching", "jacobian_kd"),),
}


def table() -> str:
    """Every system's parts and the controls, as Markdown."""
    rows = [(name, part) for name, parts in SYSTEMS.items() for part in parts]
    lines = [_line(name, part) for name, part in rows]
    controls = [f"`{method.name}`" for method in _methods("*") if method.control]
    whole = ("Controls", "—", ", ".join(controls), "—", "no", "all", "beside every method")
    return "\n".join([*HEAD, *lines, f"| {' | '.join(whole)} |"])


def _line(system: str, part: Component) -> str:
    found = [name for file in part.files for name in _names(part.kind, file)]
    cells = _told(part.kind, found) if found else ("no", "", "", "", "")
    if found and part.guess:
        cells = (cells[0], part.guess, "yes †", *cells[3:])
    return f"| {system} | {part.what} | {' | '.join(cell or '—' for cell in cells)} |"


def _names(kind: str, pattern: str) -> list[str]:
    return sorted(file.stem for file in FOLDERS[kind].glob(f"{pattern}.py"))


def _told(kind: str, names: list[str]) -> tuple[str, ...]:
    """Files, source, whether reconstructed, families and rank of what is implemented."""
    if kind == "method":
        found = [row for name in names for row in methods.read(FOLDERS[kind] / f"{name}.py").rows]
        return _listed(row.name for row in found), *_of_methods(found)
    constants = [_constants(FOLDERS[kind] / f"{name}.py") for name in names]
    ranked = {"recovery": "recoveries", "stage": "no, beside"}[kind]
    return _listed(names), *_origin(constants), "all", ranked


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _methods(pattern: str) -> list[methods.Method]:
    return [methods.read(FOLDERS["method"] / f"{name}.py") for name in _names("method", pattern)]


def _of_methods(found: list[methods.Method]) -> tuple[str, ...]:
    constants = [
        {"FAITHFUL_TO": one.faithful_to, "RECONSTRUCTION": one.reconstruction} for one in found
    ]
    families = dict.fromkeys(family for one in found for family in one.families or ("all",))
    families = ["all"] if "all" in families else families
    classes = ", with classes" if any(one.needs_classes for one in found) else ""
    guessed = [one.guessed for one in found]
    ranked = "variants, unranked" if all(guessed) else "selections, methods"
    return *_origin(constants), ", ".join(families) + classes, ranked


def _origin(constants: list[dict]) -> tuple[str, str]:
    sources = dict.fromkeys(one.get("FAITHFUL_TO", "") for one in constants)
    told = "; ".join(source for source in sources if source) or "not stated"
    return told, "yes †" if any(one.get("RECONSTRUCTION") for one in constants) else "no"


def _constants(file: Path) -> dict[str, object]:
    """The literal constants of a module, which is not run."""
    assigned = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Assign)]
    named = [(node.targets[0], node.value) for node in assigned]
    return {
        target.id: value.value
        for target, value in named
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant)
    }


def written(page: str) -> str:
    """The page with the table of today."""
    return re.sub(MARKS, lambda match: f"{match[1]}{table()}\n{match[2]}", page, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
