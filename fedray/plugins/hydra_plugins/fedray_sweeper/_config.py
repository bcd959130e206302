"""What the sweeper can be told. In a module that Hydra does not run by itself: it would break dataclasses there."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class FedraySweeperConfig:
    """Settings under `hydra.sweeper`, set by `+sweep=NAME`.

    file: of the saved sweep. given: the other overrides. command: the arguments as they were given, for records. All as
    urllib.parse.quote writes them: they are no settings of this configuration, and ${...} in them none of its own.
    """

    _target_: str = "hydra_plugins.fedray_sweeper.sweeper.FedraySweeper"
    file: str = MISSING
    given: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


ConfigStore.instance().store(group="hydra/sweeper", name="fedray", node=FedraySweeperConfig, provider="fedray")
