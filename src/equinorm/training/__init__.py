"""Repeat: ENorm after every optimizer step.

Takes an orbit and an optimizer. Gives balanced weights after each step. Never imports cli.
"""
