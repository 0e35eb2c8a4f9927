"""Write the table of published configurations into docs/models.md.

    python scripts/write_models.py

Its source is prunebench/models/*.yaml; a test checks that the two agree.
"""

import re
from pathlib import Path

from prunebench import models

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
MARKS = r"(<!-- written by scripts/write_models\.py -->\n).*?(<!-- end -->)"


def table() -> str:
    lines = [
        "| name | network | parameters | GMACs | without attention products | authors state "
        "| layout | checkpoint |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in models.family_names():
        for name, entry in models.published(family).items():
            costs = (entry.macs, entry.macs_without_attention_products)
            cells = (
                f"`{name}`",
                entry.title,
                f"{entry.parameters:,}",
                *(f"{cost / 1e9:,.2f}" for cost in costs),
                entry.stated or "—",
                f"`{family}`: `{entry.layout}`",
                entry.checkpoint,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with the table of today."""
    return re.sub(MARKS, lambda match: f"{match[1]}{table()}\n{match[2]}", page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
