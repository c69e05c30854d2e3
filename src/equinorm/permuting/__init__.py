"""Permute: which axes of which tensors move together where hidden channels are permuted, and moving them.

Takes a module and example inputs. Gives families of channels and the same module, permuted. Never imports
balancing, training or cli.
"""
