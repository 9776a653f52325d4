"""`dgq publish`: an artifact on the Hub. The checks before it, the card, and the upload."""
