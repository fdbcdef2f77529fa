"""The clipped surrogate and the distance to the reference policy."""

from .kl import gaussian_kl
from .surrogate import Surrogate, clipped_surrogate

__all__ = ["Surrogate", "clipped_surrogate", "gaussian_kl"]
