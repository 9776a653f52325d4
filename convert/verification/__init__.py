"""Whether an artifact is what its dgq.json says it is: every byte of its files, and a sample of its weights quantised
again. And `dgq inspect`, which describes what an artifact holds."""
