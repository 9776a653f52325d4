"""`dgq mix`: a recipe for a number of bytes, by what each part of a model loses in each scheme.

mix.py           the command: checks, the order of the work, what it returns
parts.py         what is decided on together, and the schemes that are tried
trials.py        what a trial loses: KL to the BF16 model, layer by layer
choice.py        the options that lose least within the bytes
recipe_file.py   the recipe, and its file
"""
