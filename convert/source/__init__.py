"""Where a model comes from: `tiny`, a directory or the Hub. A source is checked from its headers, and adapters are
merged as it is read. What is known of the released model is here, too."""
