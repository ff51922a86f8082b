"""The file from which trainers of the indexed way read the names in their order, with shapes and dtypes."""

from __future__ import annotations

import json
from pathlib import Path

from tpmodel.v1 import weights_pb2 as pb
from tpmodel_worker.weights.numbering import indexed_tensors

FILE = "vllm_bridge_config.json"


def write_bridge_config(folder: Path, described: pb.GetParameterInfoResponse) -> Path:
    """Writes it, whole or not at all; where. Raises OSError.

    Shapes are those of full tensors: what comes goes to all ranks, and each cuts its part out.
    """
    tensors = indexed_tensors(described.parameters)
    mappings = {
        name: {
            "vllm_name": name,
            "shape": list(shape.dimensions),
            "local_shape": list(shape.dimensions),
            "dtype": f"torch.{dtype}",
            "device": described.device,
        }
        for name, shape, dtype in zip(tensors.names, tensors.shapes, tensors.dtypes, strict=True)
    }
    document = {
        "tp_degree": described.world_size,
        "dp_shard_degree": 1,
        "param_mappings": mappings,
        "param_names": list(tensors.names),
        "num_params": len(mappings),
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    temporary = file.with_suffix(".partial")
    temporary.write_text(json.dumps(document, indent=2), encoding="utf-8")
    temporary.replace(file)
    return file
