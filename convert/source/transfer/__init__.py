"""From the Hub to the disk: every answer of the server held to its form before it is used, bytes into the client's
cache, headers of files that stay there, and errors in one line."""
