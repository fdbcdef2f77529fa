"""From a dataset of prompts to whole groups and their embeddings."""

from .dataset import load_prompts
from .embeddings import PromptEmbeddings
from .from_function import dataset_from_prompt_function
from .sampler import GroupSampler
from .text_prompts import text_prompts

__all__ = ["GroupSampler", "PromptEmbeddings", "dataset_from_prompt_function", "load_prompts", "text_prompts"]
