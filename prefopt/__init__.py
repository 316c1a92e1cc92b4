"""Preference optimisation and reward modelling of language models. See docs/design.md.

Importing this package is cheap: torch and transformers are loaded on first use.
"""
from importlib import import_module

__version__ = "0.1.0"
_HOME = {"PreferenceObjective": "objectives", "Term": "objectives", "Loss": "objectives",
         "Run": "config"}
_MODULES = {"annotations", "diagnose", "forward", "label_rules", "listwise", "margins", "masks", "models",
            "objectives", "ops", "pair_weights", "pairwise", "parts", "pointwise", "recipes", "reductions",
            "references", "regularisers", "scores", "train", "update"}
__all__ = sorted({*_HOME, *_MODULES})


def __getattr__(name):
    if name in _MODULES:
        return import_module(f"prefopt.{name}")
    if name in _HOME:
        return getattr(import_module(f"prefopt.{_HOME[name]}"), name)
    raise AttributeError(f"module 'prefopt' has no attribute {name!r}; known: {', '.join(__all__)}")
