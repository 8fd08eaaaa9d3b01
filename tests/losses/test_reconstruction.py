"""The L1 reconstruction loss against a loop over pixels."""

import pytest
import torch

from ssl_vit.losses.reconstruction import reconstruction_l1
from tests.reference import losses as slow


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 1, 5, 3)])
def test_reconstruction_l1_equals_the_pixel_loop(shape):
    generator = torch.Generator().manual_seed(1)
    reconstruction, clean = torch.randn(2, *shape, generator=generator).unbind()
    mask = torch.rand(shape[0], 1, *shape[2:], generator=generator) < 0.4
    arrays = reconstruction.double().numpy(), clean.double().numpy()
    assert reconstruction_l1(reconstruction, clean).item() == pytest.approx(slow.l1(*arrays), rel=1e-5)
    assert reconstruction_l1(reconstruction, clean, mask).item() == pytest.approx(
        slow.l1(*arrays, mask.numpy()), rel=1e-5
    )
    assert reconstruction_l1(reconstruction, clean, torch.zeros_like(mask)).item() == 0
