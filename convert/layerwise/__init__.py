"""The model one layer at a time over many sequences. Calibration, refining and mixing have it in common.

samples.py    documents, cut into chunks of prompts and noised canvases
chunk.py      a chunk, and the file of hidden states
stream.py     the model, layer by layer, forwards and backwards
passes.py     the two passes over all chunks, and the way back
hooks.py      who sees the products meanwhile
schedule.py   what of a layer is quantised at once, and in how many trips
estimate.py   how much memory that takes
budget.py     how much memory there is
steady.py     sums on a CPU that do not depend on the number of threads
measure.py    how far two models' logits lie apart
"""
