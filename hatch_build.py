"""Build step: the wheel gets a copy of what stands at the repository's root for users to read."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = (
    "Snakefile",
    "config",
    "environment.yml",
    "envs",
    "local",
    "methods",
    "slurm",
    "workflow",
)


class ShippedFiles(BuildHookInterface):
    """Copies SHIPPED below prunebench/shipped, where `runtime.resources` finds them.

    Only into wheels: an editable installation uses the checkout's own.
    """

    def initialize(self, version: str, build_data: dict) -> None:
        if version == "standard":
            build_data["force_include"] |= {name: f"prunebench/shipped/{name}" for name in SHIPPED}
