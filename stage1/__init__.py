"""Stage 1: a light image encoder learns to give the embeddings of SAM3's trunk."""
