"""Layers, one file each. None imports another. `middleware.py` knows the order of the proxy's own; the others are there
for hosts to list, and nothing imports them."""
