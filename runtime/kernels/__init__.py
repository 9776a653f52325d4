"""Triton kernels and what calls them: weights repacked for the tensor cores, products, norms, attention, the sampler.
Each has a reference in runtime/model/ that it is held against.
"""
