"""The image models: the paper's form and the drop-in form, and timm's contract with both."""

import timm
import torch

from hydra_ssm.vision import HydraViT

PAPER, DROP_IN = "vit_hydra_tiny_patch4_32", "vit_hydra_dropin_tiny_patch4_32"
SMALL = {"img_size": 16, "embed_dim": 32, "depth": 3, "headdim": 16, "d_state": 4, "num_classes": 5}


def small(name=PAPER, **options):
    """A model of a few thousand parameters for pictures of 16 pixels: 4 x 4 patches."""
    own = {"num_heads": 2} if "dropin" in name else {}
    return timm.create_model(name, **{**SMALL, **own, **options}).eval()


def pictures(*size):
    return torch.randn(2, 3, *(size or (16, 16)))


def test_the_base_model_is_the_papers():
    with torch.device("meta"):
        model = timm.create_model("vit_hydra_base_patch16_224")
    assert isinstance(model, HydraViT)
    assert (len(model.encoder.layers), model.embed_dim, model.patch_embed.patch_size) == (24, 768, (16, 16))
    assert (model.order, model.pos_embed, model.global_pool, model.num_prefix_tokens) == ("row", None, "avg", 0)
    assert all(layer.feed_forward is None for layer in model.encoder.layers)
    mixers = sum(p.numel() for layer in model.encoder.layers for p in layer.mixer.parameters())
    assert mixers == 24 * 3_825_224 == 91_805_376
    assert sum(p.numel() for p in model.parameters()) == 93_203_368


def test_a_model_of_32_pixels_classifies():
    assert timm.create_model(PAPER)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert timm.create_model(DROP_IN)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
