"""Rename the project's identifiers to the field's names. `python rename.py ROOT [--stage 1]`; running it twice changes nothing.

Python files are rewritten token by token: names (also inside f-strings' braces) by RULES, the first that fits; text inside
string literals and the documents by TEXT. Prose is left alone, but for code in backticks. At the end ruff orders imports and
formats the files that changed.
"""

import argparse
import ast
import fnmatch
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

CODE = ("deltax", "tests", "benchmarks")
PAPERS = ("deltax/papers/*", "deltax/claims/*", "deltax/weights/*", "tests/*", "benchmarks/*", "deltax/parts/*")

# (stage, file globs, old, new, kind): kind is "any", "attr" (after a dot), "name" (not after a dot, no keyword of a call), or
# "kw:a|b" (a keyword of a call of a or b; "kw:part(adamw|sgd)" one whose positional arguments name adamw or sgd);
# new None: stays as it is. The first that fits decides.
RULES = []
# (stage, file globs, regex, replacement), applied to string literals and documents.
TEXT = []
# (stage, old path, new path): files that move. Imports follow by RULES and TEXT.
FILES = []


def rule(stage, globs, old, new, kind="any"):
    RULES.append((stage, (globs,) if isinstance(globs, str) else tuple(globs), old, new, kind))


def words(stage, globs, **pairs):
    for old, new in pairs.items():
        rule(stage, globs, old, new)


def text(stage, globs, pattern, new):
    TEXT.append((stage, (globs,) if isinstance(globs, str) else tuple(globs), re.compile(pattern), new))


# ---------------------------------------------------------------- stage 1: rate, decay, clip
OTHER_RATES = (
    "deltax/papers/vision/video/rope_3d.py",
    "deltax/claims/vision/video/rope_3d.py",
    "tests/papers/test_video_tokens.py",
    "deltax/papers/systems/decentralized/shardcast.py",
    "deltax/claims/systems/decentralized/shardcast.py",
    "deltax/claims/systems/parallelism/ddp.py",
    "tests/tasks/test_arithmetic.py",
    "tests/lab/test_statistics.py",
    "tests/lab/test_gain.py",
    "tests/lab/conftest.py",
    "tests/site/fakes.py",
    "deltax/lab/figures.py",  # the keys of a stored comparison
)
SCALED = (
    "deltax/lab/*",
    "deltax/cli.py",
    "deltax/train/job.py",
    "deltax/claims/optimization/normalization/batch_norm.py",
    "deltax/claims/detection/maskformer.py",
    "deltax/claims/detection/mask2former.py",
    "deltax/claims/language/adaptation/lora.py",
    "deltax/claims/vision/training/model_soup.py",
    "tests/lab/*",
)
rule(1, OTHER_RATES, "rate", None)
rule(1, "*", "rate", "lr_scale", "kw:train|job|Job|tuned|_tuned|replace|tiny")
rule(1, "*", "rate", "lr", "kw:*")
rule(1, SCALED, "rate", "lr_scale")
rule(1, ("deltax/train/*", "tests/train/*"), "rate", "lr_scale", "attr")
rule(1, "*", "rate", "lr")
words(1, "*", outer_rate="outer_lr", spectral_rate="spectral_lr")
rule(1, "deltax/train/*", "rates", "lrs")

DECAYS = (
    "deltax/papers/optimization/optimizers/*",
    "deltax/papers/optimization/local_updates/*",
    "deltax/claims/optimization/optimizers/*",
    "deltax/claims/optimization/local_updates/*",
    "deltax/claims/optimization/losses/entropy_minimisation.py",
    "deltax/parts/training/optimizers.py",
)
rule(1, "*", "decay", "weight_decay", "kw:part(adamw|sgd|muon|nadam)")
rule(1, "*", "decay", "weight_decay", "kw:adamw|sgd|muon|nadam|adam_step|descend")
rule(1, DECAYS, "decay", "weight_decay")
rule(1, "*", "decay", None)

rule(1, "deltax/parts/training/run.py", "clip", "max_grad_norm")
rule(1, "*", "clip", "max_grad_norm", "kw:part(Loop)")
rule(1, "*", "clip", "max_grad_norm", "kw:Loop")
rule(1, "*", "clip", "max_grad_norm", "after:loop")

text(1, "*", r"\b((?:optimizer|outer|inner)(?:\.inner|\.outer)*)\.rate\b", r"\1.lr")
text(1, "*", r"\b((?:optimizer|outer|inner)(?:\.inner|\.outer)*)\.decay\b", r"\1.weight_decay")
text(1, "*", r"\bouter_rate\b", "outer_lr")
text(1, "*", r"\bspectral_rate\b", "spectral_lr")
text(1, "*", r"\bloop\.clip\b", "loop.max_grad_norm")
text(1, "*", r"(?<![\w-])--rate\b", "--lr-scale")
text(1, ("deltax/*", "tests/*", "docs/*", "*.md"), r"(\b(?:adamw|sgd|nesterov|muon|nesterov_outer|nesterov-outer|momentum-lookahead|Loop)\\?\((?:[^()]*, )?)rate=", r"\1lr=")
text(1, ("deltax/*", "tests/*", "docs/*", "*.md"), r"(\b(?:adamw|sgd|muon)\\?\((?:[^()]*, )?)decay=", r"\1weight_decay=")
text(1, ("deltax/papers/optimization/*", "deltax/claims/optimization/*"), r"(?<=- )rate(?= [(gmD])", "lr")
text(1, ("deltax/papers/optimization/*", "deltax/claims/optimization/*"), r"- rate (momentum|gradient)\b", r"- lr \1")
text(1, "deltax/claims/optimization/*", r"\(1 - (?:rate|lr) decay\)", "(1 - lr weight_decay)")
text(1, ("deltax/papers/optimization/*", "deltax/claims/optimization/*"), r"w <- w - rate v\b", "w <- w - lr v")
text(1, ("deltax/papers/optimization/*", "deltax/claims/optimization/*"), r"\(g \+ decay w\)", "(g + weight_decay w)")
text(1, ("deltax/claims/optimization/*",), r"\brate \* sign\(g\)", "lr * sign(g)")
text(1, "deltax/claims/optimization/*", r"d = -rate momentum m", "d = -lr momentum m")
text(1, "deltax/parts/training/run.py", r"(?m)^    clip        ", "    max_grad_norm ")
text(1, "deltax/lab/lab.py", r"at a multiple `rate` of", "at a multiple `lr_scale` of")
text(1, "deltax/lab/tuning.py", r"`rate` is a factor", "`lr_scale` is a factor")
text(1, "deltax/train/job.py", r"^([\"'])rate\1$", r"\1lr_scale\1")
text(1, "deltax/lab/trackers.py", r"^([\"'])rate\1$", r"\1lr_scale\1")


# ---------------------------------------------------------------- stage 2: classes, functions, slots
SYMBOLS = []  # (stage, area, file stem, old, new): a definition, renamed in its file and where it is imported


def symbol(where, old, new):
    area, stem = where.split(".")
    SYMBOLS.append((2, area, stem, old, new))
    if old[0].isupper():
        text(2, "*", rf"(?<=`)((?:\w+\.)*){old}(?=[`(.\[])", rf"\g<1>{new}")


# The core: what a part is made of, and the papers that made a recipe.
CORE = ("deltax/recipe.py",)
words(2, CORE, make="target", given="kwargs", story="history", Chapter="AppliedPaper", chapter="applied")
text(2, CORE, r"`make`", "`target`")
text(2, CORE, r"`given`", "`kwargs`")
text(2, CORE, r"`story`", "`history`")
text(2, CORE, r"edit\(path, part\)", "edit(path, part)")
APPLIED = ("deltax/paper.py", "deltax/cli.py", "deltax/lab/interact.py", "tests/core/*", "tests/papers/test_lora.py")
words(2, APPLIED, Chapter="AppliedPaper", chapter="applied")
rule(2, "deltax/paper.py", "story", "history", "kw:*")
NOT_PARTS = ("deltax/library/*", "tests/tasks/test_cart_pole.py", "deltax/papers/systems/parallelism/ray.py", "tests/core/test_renamed.py")
rule(2, NOT_PARTS, "make", None)
rule(2, NOT_PARTS, "given", None)
for old, new in (("make", "target"), ("given", "kwargs"), ("story", "history")):
    rule(2, "*", old, new, "attr-not-self")
text(2, "deltax/contract.py", r"^\"make\"$", '"target"')
text(2, "deltax/contract.py", r"^\"given\"$", '"kwargs"')

# Parts
symbol("parts.nothing", "Nothing", "Identity")
symbol("parts.linear", "Glorot", "XavierLinear")
symbol("parts.linear", "Out", "OutProj")
symbol("parts.linear", "Matrix", "LinearNoBias")
symbol("parts.linear", "OutMatrix", "OutProjNoBias")
symbol("parts.linear", "faint", "init_std")
symbol("parts.linear", "soften", "depth_scaled_init")
text(2, "*", r"`faint\(", "`init_std(")
symbol("parts.stack", "straight", "sequential")
symbol("parts.stack", "in_turn", "sequential_branches")
symbol("parts.stale", "Stale", "DelayedGradients")
symbol("parts.autoencoder", "Open", "NoBottleneck")
symbol("parts.run", "told", "build_model")
symbol("parts.tiles", "wide", "accumulation_dtype")
symbol("parts.tiles", "spread", "repeat_kv")
symbol("parts.tiles", "over_heads", "expand_over_heads")
words(2, "deltax/papers/systems/attention_kernels/sage_attention.py", over_heads="expand_over_heads")
words(2, "*", memory_place="memory_pos_embed", memory_seen="memory_mask")
rule(2, ("deltax/parts/attention/context.py", "deltax/papers/detection/mask2former.py"), "place", "pos_embed")
rule(2, "*", "place", "pos_embed", "kw:Context|replace")
rule(2, "*", "place", "pos_embed", "after:ctx")
symbol("parts.context", "placed", "with_pos_embed")
text(2, "deltax/parts/attention/context.py", r"(?m)^    memory_seen  ", "    memory_mask  ")
text(2, "deltax/parts/attention/context.py", r"(?m)^    place      ", "    pos_embed  ")
text(2, "deltax/parts/attention/context.py", r"(?m)^    memory_place  ", "    memory_pos_embed  ")

# Papers
symbol("papers.online_softmax", "Seen", "RunningStatistics")
symbol("papers.online_softmax", "look", "block_statistics")
symbol("papers.flashinfer", "look", "block_state")
symbol("papers.flash_attention", "take_in", "merge_tile")
symbol("papers.flash_attention_2", "look_on", "merge_scores")
symbol("papers.flash_attention_2", "look_at_all", "attend_tiles")
symbol("papers.flash_attention_2", "nothing", "empty_tile")
words(2, "*", compare_at="matching_points", learn_at="loss_points")
text(2, "*", r"\bcompare_at\b", "matching_points")
text(2, "*", r"\blearn_at\b", "loss_points")
symbol("papers.mask2former", "inside", "masked_attention")
symbol("papers.entropy_minimisation", "sure", "entropy_loss")
symbol("papers.dropout", "Thinned", "BranchDropout")
rule(2, "deltax/papers/optimization/losses/dropout.py", "told", "takes_context", "attr")
MOCO = ("deltax/papers/vision/self_supervised/moco.py", "deltax/claims/vision/self_supervised/moco.py", "deltax/weights/vision/self_supervised/moco.py", "tests/papers/test_vision_ladder.py")
rule(2, MOCO, "slow", "key_encoder", "attr")
words(2, MOCO[:2], follow="momentum_update")
text(2, MOCO[:1], r"`slow`", "`key_encoder`")
text(2, MOCO[:1], r"slow <- momentum slow \+", "key_encoder <- momentum key_encoder +")
symbol("papers.mae", "keep", "random_masking")
symbol("papers.mae", "take", "gather")
symbol("papers.mae", "fill_in", "reconstruct")
text(2, "deltax/slots.py", r"\bfill_in\b", "reconstruct")

# Tasks: the task spec
rule(2, "deltax/lab/*", "facts", None, "name")
SPEC = ("deltax/tasks/*", "deltax/parts/training/run.py", "deltax/contract.py", "deltax/papers/language/adaptation/lora.py",
        "deltax/claims/systems/decentralized/beyond_topk.py", "tests/train/test_starts.py", "tests/papers/test_vision_ladder.py")
rule(2, SPEC, "facts", "task_spec")
rule(2, "*", "facts", "task_spec", "attr")
rule(2, "*", "facts", "task_spec", "kw:SimpleNamespace|Task")
words(2, "*", **{f"{k}Facts": f"{k}Spec" for k in ("Text", "Image", "Video", "Track", "Pair", "Bound")})
for glob in ("deltax/contract.py", "deltax/tasks/*", "deltax/parts/training/run.py"):
    text(2, glob, r"`facts`", "`task_spec`")
    text(2, glob, r"`\*\*facts`", "`**task_spec`")
text(2, "deltax/contract.py", r"^\"facts\"$", '"task_spec"')
text(2, "deltax/tasks/language/text.py", r"(?m)^    facts     ", "    task_spec ")

# Kernels
symbol("kernels.losses", "chances_kept", "saved_probabilities")
symbol("kernels.mlp", "SlopeKept", "SavedGeluDerivative")
symbol("kernels.projections", "SideBySide", "FusedQKV")

# Processes: ranks, shards, workers
symbol("parts.ring", "as_first", "on_rank_0")
symbol("parts.ring", "share", "shard")
symbol("train.mesh", "ours", "shard_index")
symbol("train.mesh", "share", "shard")
symbol("signals.signals", "deaf", "ignoring_sigint")
symbol("lab.engine", "Crew", "Pool")
words(2, "deltax/lab/engine.py", crew="pool", _crew="_pool")
text(2, "deltax/lab/*", r"`Crew`", "`Pool`")
text(2, "deltax/lab/engine.py", r"^\"Crew\"$", '"Pool"')
words(2, "deltax/lab/processes.py", _Hand="_Hired", hand="hired", hands="hired")
rule(2, ("deltax/lab/worker.py", "deltax/lab/ray_engine.py", "deltax/lab/store.py", "deltax/lab/lease.py", "tests/lab/test_store.py", "tests/site/fakes.py"), "beat", "heartbeat")

# The lab
LAB = ("deltax/lab/*", "tests/lab/*")
words(2, LAB, Strip="Sweep", _strip="_sweep", strip_json="sweep_json", Ladder="ComputeLadder")
rule(2, ("deltax/lab/tuning.py", "deltax/lab/compare.py", "deltax/lab/comparison.py", "tests/lab/test_compare.py"), "strip", "sweep", "no-call")
rule(2, ("deltax/lab/tuning.py", "deltax/lab/compare.py", "deltax/lab/comparison.py"), "strips", "sweeps")
text(2, "deltax/lab/tuning.py", r"`strip` how", "`sweep` how")
text(2, "deltax/lab/gain.py", r"ladder = Ladder\(", "ladder = ComputeLadder(")

# Slots: how an owner makes a part, and how it calls it
words(2, "deltax/slots.py", made="constructor", called="signature")
text(2, "deltax/slots.py", r"`made`", "`constructor`")
text(2, "deltax/slots.py", r"`called`", "`signature`")

FILES += [
    (2, "deltax/parts/model/nothing.py", "deltax/parts/model/identity.py"),
    (2, "deltax/parts/training/stale.py", "deltax/parts/training/delayed_gradients.py"),
    (2, "deltax/tasks/facts.py", "deltax/tasks/task_spec.py"),
]
MOVED_STEMS = {("parts", "nothing"): "identity", ("parts", "stale"): "delayed_gradients", ("tasks", "facts"): "task_spec"}

# Names of parts in strings: @needs(...), expected errors and differences, the guide
for old, new in (("Nothing", "Identity"), ("in_turn", "sequential_branches"), ("Thinned", "BranchDropout")):
    text(2, "deltax/*", rf"^([\"']){old}\1$", rf"\g<1>{new}\g<1>")
text(2, "tests/core/*", r"\bNothing\(\)", "Identity()")
text(2, "tests/core/*", r"becomes Nothing\b", "becomes Identity")
text(2, "tests/core/*", r"\bThinned becomes\b", "BranchDropout becomes")
text(2, ("docs/*", "*.md"), r"(?<=\])\.make\b", ".target")
text(2, ("docs/*", "*.md"), r"\.story\b", ".history")
words(2, ("deltax/kernels/*", "deltax/papers/language/attention/*", "deltax/claims/systems/attention_kernels/*"), blind="fully_masked")


# ---------------------------------------------------------------- machinery
def fits(globs, path):
    return any(fnmatch.fnmatchcase(path, glob) for glob in globs)


def last_name(node):
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return ""


def keywords(source):
    """(line, column in characters) of each keyword of a call -> (callee, names of its positional arguments)."""
    lines = source.splitlines(keepends=True)
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            about = last_name(node.func), {last_name(a) for a in node.args}
            for k in node.keywords:
                if k.arg:
                    column = len(lines[k.lineno - 1].encode()[: k.col_offset].decode())
                    found[k.lineno, column] = about
    return found


def symbols(source, path, stage):
    """({name: new name} of definitions of this file or imported into it, {alias of a module: {name: new name}})."""
    bare, through = {}, {}
    steps = Path(path).with_suffix("").parts
    here = (steps[1] if len(steps) > 2 else steps[-1], steps[-1]) if steps[0] == "deltax" else (None, None)
    stems = lambda area, stem: {stem, MOVED_STEMS.get((area, stem), stem)}
    nodes = list(ast.walk(ast.parse(source)))
    defined = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for s, area, stem, old, new in SYMBOLS:
        if s > stage:
            continue
        if here[0] == area and here[1] in stems(area, stem) and old in defined:
            bare[old] = new
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("deltax"):
                parts = [*node.module.split("."), None, None]
                of = parts[1] if parts[1] else None
                last = node.module.split(".")[-1]
                for name in node.names:
                    if of == area and last in stems(area, stem) and name.name == old:
                        bare[old] = new
                    if name.name in stems(area, stem) and (of == area or (of is None and area == stem)):
                        through.setdefault(name.asname or name.name, {})[old] = new
    return bare, through


def decide(rules, word, before, call, after="", known=({}, {})):
    """before: the two tokens before the name; call: what `keywords` has at its place; known: of `symbols`."""
    bare, through = known
    if before[-1:] == ["."]:
        if word in through.get((before[-2:-1] or [""])[0], {}):
            return through[before[-2]][word]
    elif call is None and word in bare:
        return bare[word]
    for old, new, kind in rules:
        if old != word:
            continue
        attr = before[-1:] == ["."]
        if kind == "any":
            return new
        if kind == "attr" and attr:
            return new
        if kind == "attr-not-self" and attr and before[-2:-1] != ["self"]:
            return new
        if kind == "no-call" and not (attr and after == "("):
            return new
        if kind == "name" and not attr and call is None:
            return new
        if kind.startswith("after:") and attr and before[-2:-1] == [kind[6:]]:
            return new
        if kind.startswith("kw:") and call is not None:
            matched = re.fullmatch(r"(\w+)\((.*)\)", kind[3:])
            if matched:
                if call[0] in (matched[1], "fill", "set") and call[1] & set(matched[2].split("|")):
                    return new
            elif kind == "kw:*" or call[0] in kind[3:].split("|"):
                return new
    return None


def in_braces(body, change):
    """Apply `change` to the expressions of an f-string's body."""
    out, depth, start, i = [], 0, 0, 0
    while i < len(body):
        c = body[i]
        if depth == 0 and body[i : i + 2] in ("{{", "}}"):
            out.append(body[i : i + 2])
            i += 2
            continue
        if c == "{":
            depth += 1
            if depth == 1:
                out.append(c)
                start = i + 1
        elif c == "}" and depth:
            depth -= 1
            if depth == 0:
                out.append(change(body[start:i]))
                out.append(c)
        elif depth == 0:
            out.append(c)
        i += 1
    return "".join(out)


WORD = re.compile(r"(?P<q>\"[^\"]*\"|'[^']*')|(?P<b>(?:(?P<p>[A-Za-z_]\w*)?(?P<d>\.))?)(?P<w>[A-Za-z_]\w*)")


IMPORT = re.compile(r"(?m)^(\s*(?:from|import) )(deltax\.[\w.]+)")


def moved_import(m):
    steps = m[2].split(".")
    steps[-1] = MOVED_STEMS.get((steps[1], steps[-1]), steps[-1])
    return m[1] + ".".join(steps)


def python(source, path, rules, texts, stage):
    calls = keywords(source)
    known = symbols(source, path, stage)
    lines = source.splitlines(keepends=True)
    edits = []  # (line, column, end line, end column, new)
    before = []
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token, following in zip(tokens, [*tokens[1:], tokens[-1]]):
        if token.type == tokenize.NAME:
            new = decide(rules, token.string, before, calls.get(token.start), following.string, known)
            if new:
                edits.append((token.start, token.end, new))
        elif token.type == tokenize.STRING:
            new = token.string
            prefix = re.match(r"[A-Za-z]*", new)[0]
            if "f" in prefix.lower():

                def change(expression):
                    def one(m):
                        if m["q"]:
                            return m[0]
                        follows = m.string[m.end() : m.end() + 1]
                        shown = decide(rules, m["w"], [m["p"] or ")", "."] if m["d"] else [], None, follows, known)
                        return m["b"] + (shown or m["w"])

                    return WORD.sub(one, expression)

                new = prefix + in_braces(new[len(prefix) :], change)
            for pattern, replacement in texts:
                new = pattern.sub(replacement, new)
            if new != token.string:
                edits.append((token.start, token.end, new))
        elif token.type == tokenize.COMMENT:
            new = token.string
            for pattern, replacement in texts:
                new = pattern.sub(replacement, new)
            if new != token.string:
                edits.append((token.start, token.end, new))
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            before = [*before[-1:], token.string]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for (l1, c1), (l2, c2), new in reversed(edits):
        source = source[: starts[l1 - 1] + c1] + new + source[starts[l2 - 1] + c2 :]
    return IMPORT.sub(moved_import, source) if stage >= 2 else source


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("root", type=Path)
    options.add_argument("--stage", type=int, default=2, help="up to which stage (1 or 2)")
    arguments = options.parse_args()
    root = arguments.root.resolve()
    for stage, old, new in FILES:
        if stage <= arguments.stage and (root / old).exists():
            (root / new).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["git", "mv", old, new], cwd=root, check=True)
    files = [p for d in CODE for p in sorted((root / d).rglob("*.py"))]
    files += [p for d in (".", "docs") for p in sorted((root / d).glob("*.md"))]
    files += sorted((root / "deltax").rglob("*.html")) + sorted((root / "deltax/site/assets").glob("*.js"))
    changed = []
    for file in files:
        path = file.relative_to(root).as_posix()
        if path in HAND:
            continue
        rules = [(o, n, k) for s, g, o, n, k in RULES if s <= arguments.stage and fits(g, path)]
        texts = [(p, n) for s, g, p, n in TEXT if s <= arguments.stage and fits(g, path)]
        old = file.read_text()
        if file.suffix == ".py":
            new = python(old, path, rules, texts, arguments.stage)
        else:
            new = old
            for pattern, replacement in texts:
                new = pattern.sub(replacement, new)
        if new != old:
            file.write_text(new)
            changed.append(file)
    scripts = [str(p) for p in changed if p.suffix == ".py"]
    for words_ in (["check", "--select", "I", "--fix", "-q"], ["format", "-q"]):
        if scripts:
            subprocess.run([str(root / ".venv/bin/ruff"), *words_, *scripts], cwd=root, check=False)
    print(f"{len(changed)} files changed", file=sys.stderr)


HAND = (  # they name old words on purpose
    "deltax/address.py",
    "deltax/errors.py",
    "tests/core/test_renamed.py",
)

if __name__ == "__main__":
    main()
