"""How Hugging Face names and lays out the tensors of each family: data, read by `sat_lightning.checkpoint`."""
