"""How fast a model denoises, where the time goes, and how far that is from the floor."""
