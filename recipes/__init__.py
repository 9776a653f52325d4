"""Data: recipes, prompts, the embedded `tiny` model and the script that trained it."""
