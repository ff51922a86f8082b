"""Tests of the whole server run on CPU ranks everywhere, and on GPUs where `-m gpu` asks for them."""

from __future__ import annotations

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
