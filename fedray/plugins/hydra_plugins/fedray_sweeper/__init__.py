"""The sweeper of saved sweeps. Every Hydra program of an environment imports this at start: nothing heavy here."""
