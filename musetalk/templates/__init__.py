"""What preprocessing leaves for every later request: a template, and the store it lies in."""
