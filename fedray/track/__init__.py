"""Metrics out: the durable store of a run (`store`), the display (`progress`) and Weights & Biases (`wandb`).

The store is the record; the other two are views of the same rows and can be rebuilt from it.
"""
