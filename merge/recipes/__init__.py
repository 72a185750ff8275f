"""What a recipe says: strict YAML, settings of tensors, mergekit's grammar."""
