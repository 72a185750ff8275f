"""How it is done from files to files: tiles, exact thresholds, shards, two passes."""
