"""Learning rates by kind of parameters, the optimizer, and the schedule."""

from lightning_modules.optimization.settings import Optimization, ParameterGroup

__all__ = ["Optimization", "ParameterGroup"]
