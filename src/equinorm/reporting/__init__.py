"""Say: numbers, words, tables and styles that all commands share.

Takes records. Gives text, pictures and files, whole or none. Never imports the commands, nor what they report on.
"""
