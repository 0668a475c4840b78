"""Whether a policy file belongs to the model at hand; asked at every compilation.

options={"policy_file": "policy.json"}, another model  ->  OptionsError: blocks.0.qkv.weight is ...

The calibrated trade-off says nothing about other weights, so another model is an error and no
warning. Other versions of this package or of torch change speed more than images: told once.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..errors import OptionsError
from .fingerprint import difference, fingerprint
from .policy_file import load

log = logging.getLogger(__name__)
_TOLD: set[str] = set()


def check_model(path: str, root: nn.Module | None) -> None:
    """Raises OptionsError if the file was made for another model than `root`.

    root: None where the graph leads to no module; said once, and taken on trust.
    """
    file = load(path)
    for package, version in versions().items():
        made = file.made_with.get(package)
        if made != version:
            _tell(f"policy file {path}: measured with {package} {made}, this is {version}")
    if root is None:
        _tell(f"policy file {path}: cannot tell whose graph this is, the model was not checked")
        return
    told = difference(file.model, fingerprint(root))
    if told is not None:
        raise OptionsError(
            f"option policy_file: {path} was made for another model ({file.model.model}): {told}; "
            "calibrate this model or leave the file out"
        )


def versions() -> dict[str, str]:
    """Of the packages that decide what is computed."""
    from .. import __version__  # the package is not complete while this module is imported

    return {"moeca_compile": __version__, "torch": str(torch.__version__)}


def _tell(message: str) -> None:
    if message not in _TOLD:
        log.warning(message)
        _TOLD.add(message)
