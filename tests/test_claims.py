"""Every exact and every parity claim of every paper is a test."""

import importlib

import pytest

from deltax import catalog

CLAIMS = [
    pytest.param(record.claims_module, claim.name, id=f"{record.key}-{claim.name}")
    for record in catalog.papers().values()
    for claim in record.claims
    if claim.kind != "measured"
]


@pytest.mark.parametrize(("module", "name"), CLAIMS)
def test_claim(module, name):
    getattr(importlib.import_module(module), name)()
