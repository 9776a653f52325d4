"""What a conversion and its artifact will need: memory, disk, time."""
