"""What an artifact lost beside the model it was made of: questions, measurements, the gate, the report."""
