"""Say: numbers, words, tables and styles that all commands share.

Takes records. Gives text and pictures. Never imports the commands, nor what they report on.
"""
