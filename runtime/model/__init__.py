"""The model by the reference's operations over packed weights: layers, attention, caches, the sampler, loading and
offloading. What a kernel replaces is defined here.
"""
