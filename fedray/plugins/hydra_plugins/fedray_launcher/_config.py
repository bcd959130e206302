"""What the launcher can be told. In a module that Hydra does not run by itself: it would break dataclasses there."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore


@dataclass
class FedrayLauncherConfig:
    """Settings under `hydra.launcher`.

    lease: whether a run leaves its processes to the next one. max_parallel: runs at a time, None for as many as fit.
    retries: how often a run that failed is tried again. force: whether to run what is done again.
    """

    _target_: str = "hydra_plugins.fedray_launcher.launcher.FedrayLauncher"
    lease: bool = True
    max_parallel: int | None = None
    retries: int = 0
    force: bool = False


ConfigStore.instance().store(group="hydra/launcher", name="fedray", node=FedrayLauncherConfig, provider="fedray")
