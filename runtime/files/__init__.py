"""What can be opened: directories and .gguf files under canonical names, their tokenizer, images and vision tower."""
