"""Images to train on: in memory, or read from folders."""
