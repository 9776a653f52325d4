"""ggml's block formats: blocks.py is what they share, then one module a format, each with its layout, its quantiser in
torch, its decoder, its grid for calibration and its facts. search.py holds the searches that several of them use.
"""
