"""The tiny world: rendered data, pretraining, reward nets and the shipped weights."""
