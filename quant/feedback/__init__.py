"""Quantisers that know what goes through a weight: error feedback over columns and rows, the grids of each scheme, and
the Triton kernels of both.
"""
