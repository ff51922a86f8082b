"""All CPU benchmarks, one after the other: `python -m benchmarks`, or `python -m benchmarks streaming scheduler`."""

from __future__ import annotations

import argparse
import subprocess
import sys

PROGRAMS = (
    "scheduler",
    "engine_steps",
    "engine_gap",
    "all_reduce_cpu",
    "linear_cpu",
    "sampling_cpu",
    "streaming",
    "serving_cpu",
    "recovery",
    "kv_transfer",
    "chat_turns",
    "weight_updates",
)


def main() -> None:
    """Runs each as a process of its own; ends with 1 if one of them failed, after all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"some of {', '.join(PROGRAMS)}; default: all")
    programs = parser.parse_args().programs or PROGRAMS
    if unknown := sorted(set(programs) - set(PROGRAMS)):
        parser.error(f"there is no {', '.join(unknown)}")
    failed = []
    for program in programs:
        print(f"\n$ python -m benchmarks.{program}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{program}"], check=False).returncode:
            failed.append(program)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
