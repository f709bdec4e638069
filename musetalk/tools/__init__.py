"""Programs beside the product: `python -m musetalk.tools.demo` and others that draw or make test files."""
