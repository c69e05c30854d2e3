"""The paper's experiments: networks, data, methods, a fair protocol, results, and pictures of them.

Takes presets. Gives results as JSON lines, tables and figures. Never imports cli.
"""
