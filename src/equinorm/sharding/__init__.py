"""Where tensors live: sharded over processes by `torch.distributed`, each of which holds a part.

Takes DTensors and their modules. Gives local parts, sums over processes, and an unsharded twin without numbers. Never imports
discovery, balancing, rescaling, training or cli.
"""
