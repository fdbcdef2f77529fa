"""A run on the Hugging Face Hub: its model card, and the upload."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .card import CardFacts, refresh_model_card, write_model_card
    from .upload import PushError, push_run

_HOMES = {
    "CardFacts": "card",
    "PushError": "upload",
    "push_run": "upload",
    "refresh_model_card": "card",
    "write_model_card": "card",
}
__all__ = ["CardFacts", "PushError", "push_run", "refresh_model_card", "write_model_card"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
