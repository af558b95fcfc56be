"""What was seen: plain data that holds no tensor, module or frame."""

from ampcheck.trace.comparison import (
    BakedConstant,
    CapturedCasts,
    Cause,
    Comparison,
    ModuleError,
    OpaqueCall,
    OutputError,
    Reason,
    Tolerance,
)
from ampcheck.trace.failure import Failure, described
from ampcheck.trace.graph import GraphTrace, Silent, StaleTensor, UncheckedSave, Write, Writer
from ampcheck.trace.model import (
    Environment,
    Host,
    ModelInfo,
    ModuleInfo,
    OptimizerInfo,
    Policy,
    ScalerInfo,
    TensorInfo,
    encloses,
)
from ampcheck.trace.site import Role, Site
from ampcheck.trace.step import AutocastRegion, AutocastState, ModuleCall, OpCall, Operand, Phase, ScalerCall, StepTrace
from ampcheck.trace.trace import Seen, Trace

__all__ = [
    "AutocastRegion",
    "AutocastState",
    "BakedConstant",
    "CapturedCasts",
    "Cause",
    "Comparison",
    "Environment",
    "Failure",
    "GraphTrace",
    "Host",
    "ModelInfo",
    "ModuleCall",
    "ModuleError",
    "ModuleInfo",
    "OpCall",
    "OpaqueCall",
    "Operand",
    "OptimizerInfo",
    "OutputError",
    "Phase",
    "Policy",
    "Reason",
    "Role",
    "ScalerCall",
    "ScalerInfo",
    "Seen",
    "Silent",
    "Site",
    "StaleTensor",
    "StepTrace",
    "TensorInfo",
    "Tolerance",
    "Trace",
    "UncheckedSave",
    "Write",
    "Writer",
    "described",
    "encloses",
]
