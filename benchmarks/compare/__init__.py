"""This project beside nginx, a bare server and other proxies, measured in one run: `python -m benchmarks.compare`."""
