"""Opens an artifact and runs it: one block-denoising engine for every format."""
