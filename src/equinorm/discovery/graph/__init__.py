"""The graph: export, memory that values share, side effects, opaque submodules.

Takes a module and example inputs. Gives a graph of operations and the values that enter it. Never imports rules.
"""
