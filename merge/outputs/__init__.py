"""What stands around the merged weights: configuration, card, pictures."""
