"""Scale groups: what others write by hand as mappings, and what can be asked of them.

Takes an orbit, its families, and the values inside the network. Gives groups, answers about mappings, and log-scales near
wishes. Never imports balancing, training or cli.
"""
