"""The model by the reference's operations over packed weights: layers, attention, caches and the sampler; and how
weights are loaded, placed and offloaded. Everything that a kernel replaces is defined here.
"""
