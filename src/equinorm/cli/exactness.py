"""When outputs count as exact, and what for the command line copies models."""

from equinorm._deviation import LIMITS, coarsest

__all__ = ["LIMITS", "VERIFYING", "coarsest"]

VERIFYING = "to verify its outputs"
"""What the command line copies models for."""
