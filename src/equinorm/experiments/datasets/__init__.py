"""Images to train on: in memory, or read from folders.

Takes a run and a folder. Gives images and classes for training and scoring. Never imports networks nor trainers.
"""
