"""What a quantised weight is: one module a scheme, each with its quantiser, its decoder and every fact that is true of
the scheme alone; registry.py knows them by name. No model, no files.
"""
