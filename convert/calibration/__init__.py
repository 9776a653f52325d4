"""Calibration: what goes through each weight of a model, gathered into STATS; input scales for W4A4.

calibrate.py      `dgq calibrate`: rounds over the documents until every expert has seen enough tokens
input_sums.py     the hook that adds up what goes into each weight
trajectories.py   canvases of the real sampler
unfinished.py     what an unfinished calibration keeps
stats.py          STATS: reading and checking, and what experts saw
samples_file.py   the samples in STATS
imatrix.py        the same sums as llama.cpp's importance matrix
input_scales.py   input scales of W4A4, without STATS
"""
