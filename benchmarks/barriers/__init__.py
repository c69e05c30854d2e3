"""Barriers of linear interpolation between two networks: train pairs, bring them together, and look at what lies between."""
