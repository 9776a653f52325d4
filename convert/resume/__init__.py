"""Unfinished work: one lock, one identity, units of work that are kept as soon as they are done."""
