"""`dgq calibrate`: what goes through each weight of a model, gathered into STATS; input scales for W4A4."""
