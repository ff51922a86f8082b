"""The main job on the embedded default: serve a small model with two ranks, ask it something, stop.

Does what a user does by hand: `tpmodel serve`, `tpmodel generate`, `tpmodel status`, Ctrl-C.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tpmodel import ChatMessage, Client
from tpmodel.local import LocalServer

MODEL = Path(__file__).parent / "default_model"
OPTIONS = ["--served-name", "default", "--dtype", "float32", "--drain-timeout", "10", "--log-format", "text"]
QUESTIONS = ["Tell me a story about a fox.", "What is tensor parallelism?"]


def main() -> None:
    """Serves, asks, shows the ranks, stops."""
    print(f"$ tpmodel serve {MODEL} --tp 2 --device cpu {' '.join(OPTIONS)}", flush=True)
    server = LocalServer(MODEL, tp=2, device="cpu", options=OPTIONS, echo=True)
    with server, Client(server.target) as client:
        for question in QUESTIONS:
            print(f"\n> {question}", flush=True)
            for chunk in client.generate([ChatMessage("user", question)], max_tokens=120, timeout=60):
                print(chunk.text, end="", flush=True)
            print(flush=True)
        print("\n$ tpmodel status", flush=True)
        command = [sys.executable, "-m", "tpmodel", "status", "--target", server.health_target]
        subprocess.run(command, check=True, timeout=30)
    print(f"stopped with exit code {server.process.returncode}", flush=True)
    sys.exit(server.process.returncode)


if __name__ == "__main__":
    main()
