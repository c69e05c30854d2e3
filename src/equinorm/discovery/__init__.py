"""Find: how every tensor of a network scales with its free scale classes.

Takes a module and example inputs. Gives scalings, families and pins. Never imports balancing, rescaling, training or cli.
"""
