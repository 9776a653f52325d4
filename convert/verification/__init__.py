"""Is an artifact what it says it is? Every byte, a sample quantised anew, and what an artifact holds."""
