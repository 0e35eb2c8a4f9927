"""Write workflow/schemas from the models of tracks' settings, for editors (docs/tracks.md).

A file of `config/` names its schema in its first line, which VS Code's YAML extension and others
read: `# yaml-language-server: $schema=../workflow/schemas/track.schema.json`.
"""

import json
from pathlib import Path

from pydantic import BaseModel

from prunebench.tracks.settings_benchmark import BenchmarkSettings
from prunebench.tracks.settings_efficiency import EfficiencySettings

FOLDER = Path(__file__).parents[1] / "workflow" / "schemas"
SCHEMAS = {
    "track.schema.json": BenchmarkSettings,
    "efficiency.schema.json": EfficiencySettings,
}


def text_of(settings: type[BaseModel]) -> str:
    """The schema of a track's file: a track that rests on another states only what differs."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    schema |= settings.model_json_schema()
    base = {"type": "string", "description": "The track beside this one that it rests on."}
    schema["properties"] = {"base": base, **schema["properties"]}
    whole = {"required": schema.pop("required")}
    schema["anyOf"] = [{"required": ["base"]}, whole]
    return json.dumps(schema, indent=1) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, settings in SCHEMAS.items():
        (FOLDER / name).write_text(text_of(settings))


if __name__ == "__main__":
    main()
