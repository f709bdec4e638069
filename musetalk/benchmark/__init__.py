"""What the pipeline costs, measured: `python -m musetalk.benchmark`."""
