"""Vision transformers, forward and backward, against transformers' at equal shape."""

import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import timing
from deltax import kernels
from deltax.paper import paper_of
from deltax.papers.vision.backbones.hiera import OverlappingPatches, hiera
from deltax.papers.vision.backbones.q_pooled_attention import ZOrdered, q_pooled_attention
from deltax.papers.vision.backbones.swin import swin
from deltax.papers.vision.backbones.vit import vit
from deltax.papers.vision.self_supervised.mae import mae
from deltax.recipe import Part

B, SIZE = 4, 112


def main() -> None:
    """Small ViT, Swin, Hiera and MAE on images of 112 pixels."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(os.cpu_count() or 1)
    rows = {}
    for name, (tree, size, peer) in _pairs().items():
        ours = kernels.fastest(tree, torch.device("cpu"))(3, size)
        said = (lambda images, ours=ours: ours(images).pixels) if "MAE" in name else ours
        seconds = timing.interleave(
            {"ours": _both_ways(said, size), "peer": _both_ways(peer, size)}, rounds=9, warmup=2
        )
        rows[name] = timing.ratio(seconds["ours"], seconds["peer"])
    timing.store("vision", rows)


def _pairs() -> dict[str, tuple[Part, int, Callable[[Tensor], Tensor]]]:
    import transformers

    base = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
    vit_peer = transformers.ViTModel(transformers.ViTConfig(**base, image_size=SIZE, patch_size=8), False)
    swin_peer = transformers.SwinModel(
        transformers.SwinConfig(
            image_size=SIZE, patch_size=4, embed_dim=48, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=7,
            drop_path_rate=0.0,
        ),
        False,
    )  # fmt: skip
    hiera_peer = transformers.HieraModel(
        transformers.HieraConfig(image_size=[96, 96], embed_dim=48, depths=[1, 2, 2, 1], num_heads=[1, 2, 4, 8]), False
    )
    mae_peer = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            **base, image_size=SIZE, patch_size=8, decoder_hidden_size=96, decoder_num_hidden_layers=2,
            decoder_num_attention_heads=3, decoder_intermediate_size=384,
        )
    )  # fmt: skip
    small = paper_of(vit)(dim=192, depth=4, heads=3, patch=8)
    windows = paper_of(vit)(dim=192, heads=8, patch=4) + swin(window=7, depths=(2, 2, 2))
    pyramid = paper_of(vit)(dim=384, heads=8) + q_pooled_attention(depths=(1, 2, 2, 1)) + hiera(local=2)
    last = lambda peer: lambda images: peer(images).last_hidden_state
    return {
        "ViT against transformers ViTModel": (small["model.trunk"], SIZE, last(vit_peer)),
        "Swin against transformers SwinModel": (windows["model.trunk"], SIZE, last(swin_peer)),
        "Hiera against transformers HieraModel": (
            pyramid.set(ZOrdered, inner=OverlappingPatches)["model.trunk"],
            96,
            last(hiera_peer),
        ),
        "MAE against transformers ViTMAEForPreTraining": (
            (small + mae(dim=96, depth=2, heads=3))["model"],
            SIZE,
            lambda images: mae_peer(images).logits,
        ),
    }


def _both_ways(model: Callable[[Tensor], Tensor], size: int) -> Callable[[], None]:
    images = torch.randn(B, 3, size, size)
    return lambda: model(images).sum().backward()
