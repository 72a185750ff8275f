"""Files: checkpoints of Hugging Face, adapters, masks, the state of a run."""
