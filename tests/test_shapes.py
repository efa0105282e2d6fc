"""The suite checks the shapes of arrays, of functions and of dataclasses, and wraps nothing else."""

import pytest
import torch
from jaxtyping import TypeCheckError

from resid_surgery.attribution.shares import Listed
from resid_surgery.surgery.measures import kl_divergence
from resid_surgery.surgery.sweeping import token_budget


def test_an_array_of_another_shape_is_found():
    assert kl_divergence(torch.zeros(3), torch.zeros(3)) == 0
    for clean, logits in ((torch.zeros(3), torch.zeros(4)), (torch.zeros(3, 1), torch.zeros(3, 1))):
        with pytest.raises(TypeCheckError, match="kl_divergence"):
            kl_divergence(clean, logits)


def test_a_field_of_another_shape_or_kind_is_found():
    shares, whole = torch.zeros(3), torch.zeros(3, dtype=torch.long)
    assert Listed(shares, whole, whole, 0.0, 0.0, 3).count == 3
    for wrong in (torch.zeros(4, dtype=torch.long), shares):
        with pytest.raises(TypeCheckError, match="Listed"):
            Listed(shares, whole, wrong, 0.0, 0.0, 3)


def test_what_has_no_array_is_left_as_it_is():
    assert not hasattr(token_budget, "__wrapped__")
    assert hasattr(kl_divergence, "__wrapped__")
