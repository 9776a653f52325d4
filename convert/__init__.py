"""Makes an artifact: source, plan, pipeline, command line."""
