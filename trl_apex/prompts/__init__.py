"""From a dataset of prompts to whole groups and their embeddings."""

from .embeddings import PromptEmbeddings
from .from_function import dataset_from_prompt_function
from .sampler import GroupSampler

__all__ = ["GroupSampler", "PromptEmbeddings", "dataset_from_prompt_function"]
