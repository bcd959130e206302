"""The launcher of fedray's sweeps. Every Hydra program of an environment imports this at start: nothing heavy here."""
