"""`-m` with fedray: composes the cells of a sweep and hands them over, all to run on one Ray cluster."""

from typing import Any

from hydra.plugins.launcher import Launcher
from hydra_plugins.fedray_launcher import _config  # noqa: F401 - makes the settings known


class FedrayLauncher(Launcher):
    """Runs the cells of a sweep as `fedray.sweep.run` does; what failed is raised when all have ended."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:  # noqa: ARG002
        from fedray.cli import Composer
        from fedray.sweep.run import Options

        # The sweeper composes every cell to see whether it can be; once is enough, and one bad cell is one bad cell.
        hydra_context.config_loader = self.composer = Composer(hydra_context.config_loader)
        self.config, self.options = config, Options(**self.settings)

    def launch(self, job_overrides: Any, initial_job_idx: int) -> Any:  # noqa: ARG002
        from fedray.cli import launch_cells

        return launch_cells(self.composer, self.config, [list(one) for one in job_overrides], self.options)
