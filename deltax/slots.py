"""The glossary of slots: each role a part can have, who calls it, and with what. Papers are written to this API.

A slot is an argument that holds a part. `recipe.fill("norm", DyT)` fills every slot of that name, wherever it is.
Shapes are those of `deltax.shapes`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """`constructor` is how the owner makes the part, `signature` how it calls it; plain functions are only called."""

    owner: str
    signature: str
    meaning: str
    constructor: str = ""


SLOTS: dict[str, Slot] = {
    # The run
    "model": Slot("Run", "model(inputs...)", "the network", constructor="model(**facts of the task that it names)"),
    "task": Slot(
        "Run",
        "task.batch, task.evaluate, ...",
        "data, split and score; see deltax.tasks.language.text",
        constructor="task()",
    ),
    "objective": Slot("training loop", "objective(model, batch) -> (B,)", "one loss for each example"),
    "batches": Slot(
        "training loop",
        "batches(model, task, step, size=, seed=) -> batch",
        "what a step learns from; rollouts go here",
    ),
    "optimizer": Slot("training loop", "optimizer(model) -> torch Optimizer", "groups carry their own rate"),
    "schedule": Slot("training loop", "schedule(progress) -> factor", "the rate over the run, progress in [0, 1)"),
    "loop": Slot("training loop", "loop() -> Loop", "batch size, default length, clipping, accumulation"),
    # Many workers
    "outer": Slot(
        "LocalSteps, Asynchronous", "outer(weights) -> torch Optimizer", "steps along what a round's workers found"
    ),
    "exchange": Slot(
        "LocalSteps", ".among(vectors), .over(group, vector) -> mean", "who sends what", constructor="exchange()"
    ),
    "code": Slot(
        "Exchange", ".encode(vector) -> payload; .decode(payload) -> vector", "on the wire", constructor="code()"
    ),
    "pace": Slot("Asynchronous", "pace(speed, fastest, every) -> int", "steps of a worker between its pushes"),
    "attendance": Slot("LocalSteps", "attendance(round, worker) -> bool", "who takes part in a round's exchange"),
    # Stages of a pipeline
    "choose": Slot("Cut", "choose(x, keep) -> mask over x (B, T, D)", "what of the stream crosses to the next stage"),
    # The language model
    "embedding": Slot(
        "LanguageModel", "tokens (B, T) -> (B, T, D)", "has a .weight (V, D)", constructor="embedding(vocab, dim)"
    ),
    "position": Slot(
        "LanguageModel, ViT",
        "x (B, T, D), ctx -> (B, T, D)",
        "positions on the stream",
        constructor="position(dim, context), of an image position(dim, (rows, columns))",
    ),
    "stack": Slot("LanguageModel, ViT", "x (B, T, D), ctx -> (B, T, .width)", "depth", constructor="stack(dim)"),
    "norm": Slot("LanguageModel, residuals", "x (..., D) -> (..., D)", "normalisation", constructor="norm(dim)"),
    "head": Slot(
        "LanguageModel", "x (B, T, D), embedding -> (B, T, V)", "stream to logits", constructor="head(dim, vocab)"
    ),
    "inner": Slot(
        "wrapping parts", "as the slot that was wrapped", "what a part was wrapped around", constructor="as it was"
    ),
    # Depth
    "block": Slot("Stack", "x (B, T, D), ctx -> (B, T, D)", "one layer", constructor="block(dim)"),
    "entry": Slot(
        "Stack", "x (B, T, D) -> (B, T, D)", "what the stream passes before the first block", constructor="entry(dim)"
    ),
    "stages": Slot("Stages", "as a stack", "a tuple: one stack after the other", constructor="stage(dim 2^i)"),
    "merges": Slot(
        "Stages",
        "x (B, T, D), ctx -> (B, T', 2 D), ctx of theirs",
        "a tuple: between stages",
        constructor="merge(dim 2^i)",
    ),
    "shortcut": Slot(
        "PooledBlock", "(..., D) -> (..., D')", "the stream to its new width", constructor="shortcut(D, D')"
    ),
    "passage": Slot("Stack", "blocks, x (B, T, D), ctx -> (B, T, D)", "how the stream passes the blocks"),
    "branches": Slot("Block", "block, x (B, T, D), ctx -> (B, T, D)", "how a block goes through its two branches"),
    "residual": Slot("Block", "x, branch -> x", "how a branch joins the stream", constructor="residual(dim)"),
    "mixer": Slot(
        "Block", "x (B, T, D), ctx -> (B, T, D)", "the branch that mixes positions", constructor="mixer(dim)"
    ),
    "mlp": Slot("Block", "x (B, T, D)[, ctx] -> (B, T, D)", "the branch that does not", constructor="mlp(dim)"),
    "up": Slot("MLP", "(..., D) -> (..., F)", "into the hidden width", constructor="up(dim, hidden)"),
    "activation": Slot("MLP, LeNet, Perceptron", "(..., F) -> (..., F)", "elementwise"),
    "down": Slot("MLP", "(..., F) -> (..., D)", "back to the stream", constructor="down(hidden, dim)"),
    "gate": Slot(
        "SwiGLU", "(..., D) -> (..., F)", "into the gate of the hidden width", constructor="gate(dim, hidden)"
    ),
    # Encoder and decoder
    "encoder": Slot(
        "EncoderDecoder, DETR, Autoencoder",
        "x (B, S, D), ctx -> (B, S, D); of pixels (B, C, ...) -> latent (B, K, ...)",
        "what reads",
        constructor="encoder(dim), of pixels encoder(channels, K)",
    ),
    "decoder": Slot(
        "EncoderDecoder, DETR, MaskFormer, Autoencoder",
        "x (B, T, D), ctx with a memory -> (B, T, D); of pixels latent (B, K, ...) -> (B, C, ...); of masks "
        "maps, answer -> MaskPredictions",
        "what answers",
        constructor="decoder(dim), of pixels decoder(K, channels), of masks decoder(dim, queries)",
    ),
    "bottleneck": Slot(
        "Autoencoder",
        "latent (B, K, ...) -> Passed(latent (B, K', ...), cost (B,), codes or None); .enters is K, .leaves K'",
        "what is let through between encoder and decoder",
        constructor="bottleneck()",
    ),
    "patcher": Slot(
        "CosmosEncoder, CosmosDecoder",
        ".cut(video) -> (B, p^3 C, T', Y / p, X / p), .join its inverse, .patch is p",
        "what a video tokenizer begins and ends with",
        constructor="patcher()",
    ),
    "cross": Slot(
        "DecoderBlock",
        "x (B, T, D), ctx with a memory -> (B, T, D)",
        "the branch that asks the memory",
        constructor="cross(dim)",
    ),
    # Images
    "backbone": Slot(
        "ResNet, DETR, ...",
        "images (B, C, Y, X) -> (B, .width, Y', X'); .strides",
        "images to maps",
        constructor="backbone(channels)",
    ),
    "stem": Slot(
        "Backbone", "(B, C, Y, X) -> (B, D, Y', X')", "what comes before the units", constructor="stem(channels, width)"
    ),
    "unit": Slot(
        "Backbone", "(B, C, Y, X) -> (B, D, Y/stride, X/stride)", "one residual unit", constructor="unit(C, D, stride)"
    ),
    "branch": Slot("Residual", "as its unit", "the convolutions of a unit", constructor="branch(C, D, stride)"),
    "map_norm": Slot(
        "convolutions, LeNet, Perceptron",
        "(B, C, ...) -> (B, C, ...)",
        "normalisation of maps",
        constructor="map_norm(C)",
    ),
    "classifier": Slot(
        "ResNet, ImageClassifier", "(B, D) -> (B, V)", "features to logits", constructor="classifier(width, classes)"
    ),
    "trunk": Slot(
        "ImageClassifier",
        "images (B, C, Y, X) -> (B, .prefix + T, .width), .grid the rows and columns of T",
        "images to a normed stream",
        constructor="trunk(channels, size)",
    ),
    "patches": Slot(
        "ViT",
        "images (B, C, Y, X) -> (B, T, D), row by row; .grid(size) -> (rows, columns)",
        "images to tokens",
        constructor="patches(channels, dim)",
    ),
    "embed": Slot("Patches", "(B, T, F) -> (B, T, D)", "the pixels of a patch to a token", constructor="embed(F, dim)"),
    "class_token": Slot(
        "ViT", "x (B, T, D) -> (B, .count + T, D)", "what stands before the patches", constructor="class_token(dim)"
    ),
    "pixel_decoder": Slot(
        "MaskedAutoencoder",
        "latent (B, .prefix + T, W), kept (B, T) -> (B, N, F)",
        "seen patches to the pixels of all",
        constructor="pixel_decoder(trunk, F)",
    ),
    "target": Slot("reconstruct", "patches (B, T, F) -> (B, T, F)", "what masked patches are to be"),
    "pool": Slot("ImageClassifier", "x (B, T, D) -> (B, D)", "a stream to features", constructor="pool(dim)"),
    # Two encoders
    "image": Slot(
        "DualEncoder", "images (B, C, Y, X) -> (B, K)", "what sees", constructor="image(channels, size, width)"
    ),
    "text": Slot("DualEncoder", "tokens (B, T) -> (B, K)", "what reads", constructor="text(vocab, context, width)"),
    "sound": Slot(
        "Bound",
        "spectrograms (B, 1, bands, frames) -> (B, K)",
        "what hears",
        constructor="sound(1, (bands, frames), width)",
    ),
    "summary": Slot("TextEncoder", "x (B, T, D), ended (B, T) -> (B, D)", "a text's stream to features"),
    "logits": Slot("DualEncoder", "cosines (N, M) -> (N, M)", "how much a likeness says", constructor="logits()"),
    "dropout": Slot(
        "LeNet, Perceptron", "units -> units", "noise on hidden units in training", constructor="dropout()"
    ),
    "view": Slot("contrast", "images (B, C, Y, X) -> images", "a random change that leaves what is shown"),
    "projector": Slot(
        "Contrastive", "features (B, D) -> (B, K)", "into the space of the loss", constructor="projector(dim)"
    ),
    "level": Slot(
        "UNet", "x (B, C, Y, X), ctx -> (B, D, Y, X)", "the units at one resolution", constructor="level(C, D, dim)"
    ),
    "skip": Slot("UNet", "x, remembered (B, C, Y, X) -> x", "how a map meets the one of its size from the way down"),
    "detection_head": Slot(
        "DETR",
        "x (B, N, D) -> logits (B, N, V + 1), boxes (B, N, 4)",
        "objects of a stream",
        constructor="detection_head(dim, classes)",
    ),
    "pixel_pyramid": Slot(
        "MaskFormer",
        "maps [(B, widths[i], Y', X'), ...] -> embeddings (B, D, Y, X), maps that queries read [(B, D, Y', X'), ...]",
        "the pixel decoder: maps to embeddings of pixels",
        constructor="pixel_pyramid(widths, dim)",
    ),
    "mask_head": Slot(
        "MaskFormer",
        "x (..., B, N, D), embeddings (B, D, Y, X) -> logits (..., B, N, V + 1), masks (..., B, N, Y, X)",
        "classes and masks of a stream",
        constructor="mask_head(dim, classes)",
    ),
    "attention_mask": Slot(
        "MaskedQueries", "masks (B, N, Y, X), rows, columns -> (B, N, S) or None", "where on a map each query may look"
    ),
    "matching_points": Slot(
        "mask_classification",
        "masks (L, B, N, Y', X'), truth (B, M, Y, X) -> (L, B, N, P), (B, M, P)",
        "the points at which the matching compares masks",
    ),
    "loss_points": Slot(
        "mask_classification",
        "masks (R, Y', X'), truth (R, Y, X) -> (R, P), (R, P)",
        "the points at which matched masks learn",
    ),
    "pixel_loss": Slot("mask_classification", "logits, truth -> loss, elementwise", "how wrong a mask is at a point"),
    "maps": Slot(
        "RegionDetector, OneStage",
        "images (B, C, Y, X) -> [maps (B, .width, Y', X'), ...]; .strides",
        "what regions are cut from",
        constructor="maps(channels)",
    ),
    "proposals": Slot(
        "RegionDetector",
        "maps, images, strides -> Proposals; .loss(proposals, boxes, real) -> (B,)",
        "where to look",
        constructor="proposals(width)",
    ),
    "regions": Slot(
        "RegionDetector",
        "maps, images, Regions, strides -> (N, ...)",
        "features of each region, .width in all",
        constructor="regions(width)",
    ),
    "region_head": Slot(
        "RegionDetector",
        "features (N, ...) -> logits (N, V + 1), offsets (N, V, 4)",
        "what is said of a region",
        constructor="region_head(width, classes)",
    ),
    "dense_head": Slot(
        "OneStage",
        "[maps] -> logits (B, S, V), offsets (B, S, 4)",
        "what is said of every anchor",
        constructor="dense_head(width, classes, anchors of a cell)",
    ),
    "anchors": Slot(
        "Windows, RPN, OneStage", "[(rows, columns, stride)] -> [(S, 4)]", "boxes of a map", constructor="anchors()"
    ),
    "merge": Slot("Pyramid", "coarser, finer (B, D, Y, X) -> (B, D, Y, X)", "what comes down from the level above"),
    "top": Slot(
        "Pyramid",
        "deepest, last (B, ., Y, X) -> [maps]; .steps",
        "levels beyond the last",
        constructor="top(deepest, dim)",
    ),
    # Attention
    "project": Slot(
        "Attention",
        ".split(x, memory, values) -> q, k, v; .join(heads) -> x",
        "stream to heads and back",
        constructor="project(dim, heads)",
    ),
    "query": Slot("Projections", "(..., D) -> (..., D)", "", constructor="query(dim, dim)"),
    "key": Slot("Projections", "(..., D) -> (..., D)", "", constructor="key(dim, dim)"),
    "value": Slot("Projections", "(..., D) -> (..., D)", "", constructor="value(dim, dim)"),
    "out": Slot("Projections", "(..., D) -> (..., D)", "writes to the stream", constructor="out(dim, dim)"),
    "qk_norm": Slot(
        "Attention", "(B, T, H, K) -> (B, T, H, K)", "normalises queries and keys", constructor="qk_norm(K), twice"
    ),
    "qk_position": Slot(
        "Attention",
        "(B, T, H, K), positions -> (B, T, H, K)",
        "positions on queries and keys",
        constructor="qk_position(K)",
    ),
    "score": Slot(
        "Rules",
        "scores, b, h, q, k -> scores",
        "changes scores, as FlexAttention's score_mod",
        constructor="score(heads) if a class",
    ),
    "mask": Slot("Rules", "b, h, q, k -> bool", "who may look, as FlexAttention's mask_mod"),
    "kernel": Slot("Attention", "q, k, v, rules -> (B, T, H, K)", "computes attention; `attend` is the reference"),
    # The denoiser
    "body": Slot(
        "Denoiser",
        "x (B, C, Y, X), ctx -> (B, C, Y, X)",
        "the network, told of time and label by ctx.condition",
        constructor="body(channels, size, dim)",
    ),
    "time": Slot("Denoiser", "times (B,) in [0, 1] -> (B, D)", "how noised the image is", constructor="time(dim)"),
    "label": Slot(
        "Denoiser", "labels (B,) or None -> (B, D)", "what it should show", constructor="label(classes, dim)"
    ),
}
