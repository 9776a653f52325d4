"""What a conversion would write, decided from headers alone: recipes, tensors, metadata. Reads no weight."""
