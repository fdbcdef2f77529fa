"""From prompt embeddings to images, remembering the stochastic steps."""
