"""From a dataset of prompts to whole groups and their embeddings."""

from .embeddings import PromptEmbeddings
from .sampler import GroupSampler

__all__ = ["GroupSampler", "PromptEmbeddings"]
