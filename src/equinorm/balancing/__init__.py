"""Solve: the log-scales of least norm.

Takes scalings and weights. Gives log-scales and the record of how they were found. Never imports discovery, training or cli.
"""
