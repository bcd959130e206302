"""Where data come from. A source is a function with keyword-only arguments that returns a checked `Dataset`."""

from __future__ import annotations

from fedray.data.sources.builtin import digits, mnist5k, regression, synthetic
from fedray.data.sources.characters import shakespeare, text
from fedray.data.sources.named import hub

__all__ = ["digits", "hub", "mnist5k", "regression", "shakespeare", "synthetic", "text"]
