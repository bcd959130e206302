"""Pruning kernels: pure functions of trees, masks, counts, rounds and keys; no paper's policy lives here.

score: how much each coordinate matters. allocate: how many to keep in each tensor. select: which ones.
regrow: swap kept for dropped ones. schedule: how sparse in which round.

Trees and masks cover the whole layout of the parameters. Which tensors may be cut is an argument, `names`; a
tensor that it does not name is always kept whole.
"""
