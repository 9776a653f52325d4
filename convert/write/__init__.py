"""Carries a plan out: slices read, quantised and written to their places, dgq.json last."""
