"""The lines of each Y of vision and detection, and of the file in which a library has the same model whole."""

import ast
import io
import tokenize
from importlib.util import find_spec
from pathlib import Path

from benchmarks import timing
from benchmarks.peer_torchvision import FOLDER
from deltax import catalog

PEERS = {  # paper -> a module of transformers, or a file of torchvision
    "clip": "transformers.models.clip.modeling_clip",
    "detr": "transformers.models.detr.modeling_detr",
    "faster-r-cnn": "torchvision/models/detection/faster_rcnn.py",
    "fpn": "torchvision/ops/feature_pyramid_network.py",
    "hiera": "transformers.models.hiera.modeling_hiera",
    "mae": "transformers.models.vit_mae.modeling_vit_mae",
    "mask2former": "transformers.models.mask2former.modeling_mask2former",
    "maskformer": "transformers.models.maskformer.modeling_maskformer",
    "register-tokens": "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
    "resnet": "transformers.models.resnet.modeling_resnet",
    "retinanet": "torchvision/models/detection/retinanet.py",
    "siglip": "transformers.models.siglip.modeling_siglip",
    "swin": "transformers.models.swin.modeling_swin",
    "vit": "transformers.models.vit.modeling_vit",
}

SAYS = """# Lines of code

Without blank lines, comments and docstrings; a Y also without imports and claims. A Y is what its paper changes, and
the peer's file is the model whole, with its losses and the loading of its weights: the table says how much there is to
read, not how much there is. `python -m benchmarks lines` makes it again.

"""


def main() -> None:
    rows = {}
    for key, peer in PEERS.items():
        if key in catalog.papers() and (path := _file(peer)):
            rows[key] = {
                "lines": _lines(catalog.find(key).change()),
                "peer": peer,
                "peer_lines": _lines(path.read_text()),
            }
    timing.store("lines", rows)
    head = "| Paper | builds on | its Y | the peer's file | |\n|--|--|--:|--:|--|\n"
    table = [
        f"| {key} | {', '.join(catalog.find(key).on)} | {row['lines']} | {row['peer_lines']} | `{row['peer']}` |\n"
        for key, row in rows.items()
    ]
    (timing.EVIDENCE / "lines.md").write_text(SAYS + head + "".join(table))


def _file(peer: str) -> Path | None:
    """Where the peer's source is, or nothing where it is not installed."""
    if peer.endswith(".py"):
        path = FOLDER / peer
        return path if path.exists() else None
    spec = find_spec(peer)
    return Path(spec.origin) if spec and spec.origin else None


def _lines(source: str) -> int:
    """Lines that hold code."""
    spoken: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            spoken.update(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            held.update(range(token.start[0], token.end[0] + 1))
    return len(held - spoken)
