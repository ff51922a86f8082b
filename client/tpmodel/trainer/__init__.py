"""Live weight updates from a trainer into serving gangs. Needs torch.

from tpmodel.trainer import connect

with connect("10.0.0.7:9001", token=token, options={"device": "cuda:0"}) as trainer:
    trainer.send_weights(model.state_dict(), version=1)
"""

from tpmodel.trainer.errors import GangsDifferError, UpdateOrderError, WeightUpdateError
from tpmodel.trainer.options import UpdateOptions
from tpmodel.trainer.trainer import Trainer, connect
from tpmodel.trainer.update import Update

__all__ = [
    "GangsDifferError",
    "Trainer",
    "Update",
    "UpdateOptions",
    "UpdateOrderError",
    "WeightUpdateError",
    "connect",
]
