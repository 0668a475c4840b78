"""moeca_compile: `torch.compile(model, backend="moeca")` for Diffusion Transformers with experts.

compiled = torch.compile(model, backend="moeca")
images = sample(compiled, ...)           # the sampling loop stays as it is
print(moeca_compile.stats(compiled))     # what ran, what was skipped or reused
"""

from . import ops as _ops  # noqa: F401  the moeca:: ops must exist before anything names them
from .api import generation, record, reset, stats
from .calibration.calibrate import CalibrationResult, calibrate
from .capture import prepare
from .debug.explain import explain
from .debug.report import report
from .errors import MoecaError, OptionsError, UnsupportedError
from .options import Options

__version__ = "0.1.0"

__all__ = [
    "CalibrationResult",
    "MoecaError",
    "Options",
    "OptionsError",
    "UnsupportedError",
    "calibrate",
    "explain",
    "generation",
    "prepare",
    "record",
    "report",
    "reset",
    "stats",
]
