"""The resident worker: one process that keeps engines and templates and serves every kind of caller."""
