"""Parts of the model besides its modules: rotary embeddings, decoding, weight files, manual gradient."""
