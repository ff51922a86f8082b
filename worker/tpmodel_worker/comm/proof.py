"""How the members of a private group prove to each other that they know a secret token.

Gloo and NCCL ask nobody who they are, and the store through which members meet can be written by anyone who
reaches it. The token itself is never sent.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

import torch

from tpmodel_worker.comm.communicator import Communicator, CommunicatorError

NONCE_BYTES = 32
PROOF_BYTES = 32


def make_proof(token: str, role: str, purpose: str, *nonces: bytes) -> bytes:
    """PROOF_BYTES bytes that only somebody with the token can make for these nonces."""
    message = f"tpmodel\n{role}\n{purpose}\n".encode() + b"".join(nonces)
    return hmac.new(token.encode(), message, hashlib.sha256).digest()


def prove_membership(group: Communicator, token: str, purpose: str) -> None:
    """Returns once every member has proved to every other one that it knows the token. All call it.

    Raises:
        CommunicatorError: a member has another token, or failed.
    """
    members = range(group.world_size)
    nonces = [_say(group, root, secrets.token_bytes(NONCE_BYTES)) for root in members]
    for root in members:
        expected = make_proof(token, f"member {root}", purpose, *nonces)
        # The root says what it would expect itself, and every other member compares.
        if not hmac.compare_digest(_say(group, root, expected), expected):
            raise CommunicatorError(f"member {root} of the group has another token")


def _say(group: Communicator, root: int, data: bytes) -> bytes:
    """The root's bytes, on every member; all give as many."""
    own = list(data) if group.rank == root else [0] * len(data)
    tensor = torch.tensor(own, dtype=torch.uint8, device=group.device)
    return bytes(group.broadcast(tensor, root).tolist())
