"""Lets a model answer: one prompt, a conversation, or the whole way from `tiny` to an answer of each format."""
