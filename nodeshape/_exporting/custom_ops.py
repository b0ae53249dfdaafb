"""The kernels' op in ONNX: what the exporter writes for it, and the library that runs it in onnxruntime.

It is of the domain ``nodeshape``; csrc/onnxruntime/ops.cpp says what it takes and gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from nodeshape._ode.fused import _LIBRARY

if TYPE_CHECKING:
    import onnx

LIBRARY = _LIBRARY.with_name("libnodeshape_onnxruntime.so")
DOMAIN, VERSION = "nodeshape", 1


def why_missing() -> str | None:
    """Why onnxruntime cannot run the ops here, in a line; None where it can."""
    if LIBRARY.exists():
        return None
    return f"{LIBRARY.name} was not built: docs/export.md says how"


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch.onnx.export writes for each op; what only gradients need is left out."""
    import onnx
    from onnxscript import opset18, values

    domain = values.Opset(DOMAIN, VERSION)

    def solve(y0, t, weights, code, constants, tableau, steps, tolerance, max_iterations, *_):  # type: ignore[no-untyped-def]
        attributes = {"steps": steps, "tolerance": tolerance, "max_iterations": max_iterations}
        times = opset18.Cast(t, to=onnx.TensorProto.DOUBLE)
        op = values.Op(domain, "Solve", _schema("Solve", attributes))
        ys, *counts = op(y0, times, code, constants, tableau, *weights, **attributes)
        return ys, opset18.Identity(y0), *counts  # in place of the stages, which nobody reads

    return {torch.ops.nodeshape.solve.default: solve}


def _schema(name: str, attributes: dict[str, Any]) -> onnx.defs.OpSchema:
    """What the exporter must know of an op, which of several inputs, the last of them many, writes the first twice."""
    from onnx.defs import OpSchema

    parameter, kind = OpSchema.FormalParameter, OpSchema.AttrType
    variadic = OpSchema.FormalParameterOption.Variadic
    outputs = [parameter("ys", "T"), parameter("evaluations", "tensor(int64)"), parameter("residual", "tensor(double)")]
    kinds = {list: kind.INTS, float: kind.FLOAT, int: kind.INT}
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[parameter("inputs", "T", param_option=variadic, is_homogeneous=False)],
        outputs=outputs,
        type_constraints=[("T", ["tensor(float)", "tensor(double)", "tensor(int64)"], "")],
        attributes=[OpSchema.Attribute(key, kinds[type(value)]) for key, value in attributes.items()],
    )
