"""Compare a model with its export, or with itself under another setting."""

from ampcheck.export.compare import compare
from ampcheck.export.figure import draw_errors
from ampcheck.export.kernels import KERNELS, Kernel, plain_kernels
from ampcheck.export.settings import Setting, compare_settings

__all__ = ["KERNELS", "Kernel", "Setting", "compare", "compare_settings", "draw_errors", "plain_kernels"]
