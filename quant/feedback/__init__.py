"""Quantisers that know what goes through a weight: error feedback over columns and rows, and its Triton kernel. What
each scheme leaves to choose is the scheme's own Grid.
"""
