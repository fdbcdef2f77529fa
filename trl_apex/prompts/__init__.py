"""From a dataset of prompts to whole groups and their embeddings."""

from .datasets import dataset_from_prompt_function, load_prompts, text_prompts
from .embeddings import PromptEmbeddings
from .sampler import GroupSampler

__all__ = ["GroupSampler", "PromptEmbeddings", "dataset_from_prompt_function", "load_prompts", "text_prompts"]
