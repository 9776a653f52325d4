"""Tasks for lm-evaluation-harness that ship with dgq: a YAML file each, and the Python that it names."""
