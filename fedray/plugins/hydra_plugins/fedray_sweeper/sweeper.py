"""`-m +sweep=NAME`: hands the cells of a saved sweep to the launcher, whichever it is."""

import sys
from typing import Any
from urllib.parse import unquote

from hydra.plugins.sweeper import Sweeper
from hydra_plugins.fedray_sweeper import _config  # noqa: F401 - makes the settings known


class FedraySweeper(Sweeper):
    """Takes the cells from a file and from the overrides of the command; they are not a plain product."""

    def __init__(self, *, file: str, given: Any, command: Any) -> None:
        self.file, self.given, self.command = unquote(file), [*map(unquote, given)], [*map(unquote, command)]

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:  # noqa: ARG002 - Hydra's; `given` has what the cells need
        from fedray.cli import expand_arguments

        assert self.hydra_context is not None
        assert self.launcher is not None
        # What records name as the command shall be one that can be given again.
        sys.argv = [sys.argv[0], *self.command]
        expansion = expand_arguments(self.given, self.file, self.hydra_context.config_loader)
        return [self.launcher.launch([list(cell) for cell in expansion.cells], initial_job_idx=0)]
