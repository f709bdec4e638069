"""The expensive half, done once per template: faces followed, masked, encoded and cached."""
