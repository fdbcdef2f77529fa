"""A training run as pictures: one self-contained HTML page, and PNG figures."""

from .figures import image_grid, save_samples, write_figures
from .page import write_report

__all__ = ["image_grid", "save_samples", "write_figures", "write_report"]
