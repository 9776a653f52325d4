"""The command line: one file a command, with its options, its one call into the library, and its page."""
