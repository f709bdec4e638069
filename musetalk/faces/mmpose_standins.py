"""Stand-ins for parts of mmpose that DWPose never runs but whose imports fail on most machines.

`import mmpose` pulls in heads and a visualiser that want torchvision, mmdet and mmcv's compiled
operations, and evaluation code that wants xtcocotools; the first three have no wheels beside many torch
builds, the last one needs a compiler. None is used to load a pose estimator and run it. Each stand-in is
put in place only where the thing it stands for can't be imported, so a complete installation is used as
it is.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import NamedTuple


class _StandIn(NamedTuple):
    """A module replaced by empty classes while `wants` can't be imported."""

    module: str
    names: tuple[str, ...]
    wants: str


_STAND_INS = (
    _StandIn("mmpose.visualization.simcc_vis", ("SimCCVisualizer",), "torchvision"),
    _StandIn("mmpose.models.heads.hybrid_heads.rtmo_head", ("RTMOHead",), "mmdet"),
    _StandIn("mmpose.models.heads.transformer_heads", ("EDPoseHead",), "mmcv.ops"),
    _StandIn("xtcocotools", (), "xtcocotools"),
    _StandIn("xtcocotools.coco", ("COCO",), "xtcocotools"),
    _StandIn("xtcocotools.cocoeval", ("COCOeval",), "xtcocotools"),
    _StandIn("xtcocotools.mask", (), "xtcocotools"),
)


def install() -> list[str]:
    """Puts the stand-ins that are needed in place; to be called before `import mmpose`.

    Returns:
        Names of the modules replaced; empty the second time and where everything imports.
    """
    wanted = sorted({stand_in.wants for stand_in in _STAND_INS})
    absent = {name for name in wanted if not _imports(name)}
    replaced = [
        stand_in for stand_in in _STAND_INS if stand_in.wants in absent and stand_in.module not in sys.modules
    ]
    for stand_in in replaced:
        sys.modules[stand_in.module] = _empty_module(stand_in)
    return [stand_in.module for stand_in in replaced]


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):  # RuntimeError: torchvision beside another torch
        return False
    return True


def _empty_module(stand_in: _StandIn) -> ModuleType:
    module = ModuleType(stand_in.module, f"Stand-in, see {__name__}.")
    for name in stand_in.names:
        setattr(module, name, type(name, (), {"__module__": stand_in.module}))
    return module
