"""What an artifact lost beside the model that it was made of: the questions, the measurements, the order of the work.
What came of it, and the files that are written, are in the room report."""
