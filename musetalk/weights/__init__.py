"""The official weight files: where they are, whether they are whole: `python -m musetalk.weights`."""
