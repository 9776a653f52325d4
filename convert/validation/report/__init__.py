"""What a validation found, as frozen dataclasses; the gate that judges it; and its renderings as JSON, CSV, HTML and
pictures. Nothing here runs a model."""
