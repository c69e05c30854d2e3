"""Write: the same module at another point of its orbit.

Takes an orbit and log-scales. Gives the module moved: weights, gradients, optimizer state. Never imports discovery, balancing
or training.
"""
