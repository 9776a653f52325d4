"""What the commands share on a terminal: options, tables and bars, errors as one line, the canvas taking shape."""
