"""What a quantised weight is, and what an artifact's files are: no model, no network."""
