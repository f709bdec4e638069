"""Many clips in one go: rows of a table, rendered by processes of this machine or a cluster."""
