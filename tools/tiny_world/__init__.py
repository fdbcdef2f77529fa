"""How the shipped weights of the tiny world were made, and how they are measured."""
