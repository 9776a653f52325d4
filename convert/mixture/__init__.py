"""`dgq mix`: a recipe for a number of bytes, by what each part of this model loses in each scheme."""
