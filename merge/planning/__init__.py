"""What is done with what: every tensor of the result, from a recipe and headers alone."""
