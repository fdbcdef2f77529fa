"""The three trainers, and what they save, log and publish."""
