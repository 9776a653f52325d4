"""`dgq bench`: how fast a model denoises, where the time goes, and how far that is from what bytes and operations
allow."""
