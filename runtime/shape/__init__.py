"""What a model is before a weight is read: its dimensions, the names and shapes of its tensors, the sampler's settings,
the shape of a prompt with images. Nothing here computes.
"""
