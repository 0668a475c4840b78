"""Capture: making MoE dispatch that breaks Dynamo traceable, by structure and values.

    report = install(model, args, kwargs, is_active=compiling_for_moeca)
    print(report)          # per dispatch: replaced, or refused with the reason and its place
    uninstall(model)       # the model as it was

Dispatches are found by what they compute (which rows reach which expert, and what becomes of the
outputs); no module, method or variable name is looked at.
"""

from .activity import compiling_for_moeca
from .install import install, uninstall
from .report import CaptureReport, ModuleCapture
from .roots import Phase, RootCall, RootRegistry, RootState, find_root
from .trigger import FragmentTrigger, prepare, wrap_fragment

__all__ = [
    "CaptureReport",
    "FragmentTrigger",
    "ModuleCapture",
    "Phase",
    "RootCall",
    "RootRegistry",
    "RootState",
    "compiling_for_moeca",
    "find_root",
    "install",
    "prepare",
    "uninstall",
    "wrap_fragment",
]
