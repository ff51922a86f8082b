"""How much of each long test runs: CI takes a slice that fits its hour, TPMODEL_TEST_SCALE=full everything."""

from __future__ import annotations

import os

FULL = os.environ.get("TPMODEL_TEST_SCALE") == "full"

SOAK_REQUESTS = 2000 if FULL else 300
ORACLE_PROMPTS = 16
ORACLE_TOKENS = 64
SCHEDULER_SEEDS = 3000 if FULL else 120
SCHEDULER_EVENTS = 600 if FULL else 250
SCHEDULER_MACHINES = 1500 if FULL else 60
OPERATOR_MACHINES = 1500 if FULL else 40
OPERATOR_SINGLE_FAULTS = 3000 if FULL else 100
OPERATOR_ROLLOUTS = 1000 if FULL else 40
E2E_REQUESTS = 200
E2E_STREAM_SECONDS = 30.0
