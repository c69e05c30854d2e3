"""Takes a user's model and its modules. Gives the modules that are meant, copies, and ways to run them that leave no trace.

Never imports what knows of scales.
"""
