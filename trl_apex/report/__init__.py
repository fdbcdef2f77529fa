"""A training run as pictures: one self-contained HTML page, and PNG figures."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .figures import image_grid, save_samples, write_figures
    from .page import write_report

_HOMES = {"image_grid": "figures", "save_samples": "figures", "write_figures": "figures", "write_report": "page"}
__all__ = ["image_grid", "save_samples", "write_figures", "write_report"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
