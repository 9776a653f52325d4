"""An artifact on the Hub: checks, the card, the upload."""
