"""Checkpoints on disk: folders of safetensors, larger than memory, and plans as files.

Takes a folder or a plan. Gives plans, rescaled folders and comparisons. Never imports the command line.
"""
