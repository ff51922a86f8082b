"""How the tensors of a set are numbered where an index goes before each. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from tpmodel.v1 import weights_pb2 as pb


def indexed_tensors(parameters: Sequence[pb.ParameterInfo]) -> pb.UpdateRequest:
    """The set as both sides number it: every tensor that is not tied, by name in order."""
    ordered = sorted((info for info in parameters if not info.tied), key=lambda info: info.name)
    return pb.UpdateRequest(
        names=[info.name for info in ordered],
        dtypes=[info.dtype for info in ordered],
        shapes=[pb.Shape(dimensions=info.shape) for info in ordered],
        indexed=True,
    )
