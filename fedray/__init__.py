"""fedray: federated learning with pruned models, simulated on Ray. Same seed, same bits; every megabyte explained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedray.cli import resume, run
    from fedray.launch import Run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "resume", "run"]


def __getattr__(name: str) -> Any:
    # Actors import this package before torch: nothing heavy is loaded here.
    if name in ("run", "resume"):
        import fedray.cli

        return getattr(fedray.cli, name)
    if name == "Run":
        from fedray.launch import Run

        return Run
    raise AttributeError(f"module 'fedray' has no attribute {name!r}")
