"""What a quantised weight is: one module a scheme, each with its quantiser, its decoder, its grid for calibration and
every fact that is true of the scheme alone (types.Scheme lists them); ggml's formats have a room of their own, and
registry.py has a row for each scheme. No model, no files.
"""
