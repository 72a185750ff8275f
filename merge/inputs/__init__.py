"""What is read: tensors a stretch at a time, adapters folded in, vocabularies aligned."""
