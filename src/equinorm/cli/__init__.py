"""The command line: one file for each command.

Takes a command line. Gives files, text and an exit code. Nothing else imports it.
"""
