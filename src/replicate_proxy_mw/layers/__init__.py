"""The proxy's own layers, one file each. None imports another; `middleware.py` knows their order."""
