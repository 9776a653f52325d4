"""Drives lm-evaluation-harness's tasks through the engine: what is asked for, the harness's model, and the scores."""
