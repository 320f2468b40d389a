"""What the proxy answers by itself, below `/-/` under its prefix, where Replicate's API has nothing."""
