"""Where a model comes from: `tiny`, a directory or the Hub, checked from its headers, adapters merged as it is read."""
