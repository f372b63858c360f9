"""The tables and figures of docs/results.md that need no training: previews of every arm and ablation.

    python benches/python/evidence.py STORE DATA [--seeds 100] [--only main clusters ...] [--figure FILE.svg]
        [--stores embeddings=STORE warmed=STORE ...] [--noisy-data DIRECTORY]

STORE holds the gradients of DATA (`bpo.collect_gradients`); the other stores are what arms of these names choose by.
Prints Markdown: points of accuracy above random, ± the standard error over splits of this data, with the
length-controlled difference in brackets. `--noisy-data` only writes splits for `bpo compare`, with a fifth of the
training pairs turned round: 0-train.jsonl, 0-heldout.jsonl and so on.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

import bpo
from bpo._core import Sketcher, StoreWriter
from bpo.evidence.preview.results import ALL
from bpo.store.gradient_store import RECORD

BUDGETS = [60, 120]
C, A, G, N = {"centrality": 1.0}, {"alignment": 1.0}, {"score_gap": 1.0}, {"informativeness": 1.0}


def arm(name, strategy="bpo", breadth=None, **select):
    return {"name": name, "strategy": strategy, "breadth": breadth, "select": select}


GROUPS = {
    "main": [
        "bpo",
        arm("bpo, centrality + alignment", usefulness={**C, **A}),
        "matching",
        arm("random pairs of each cluster", ranking="random"),
        arm("farthest", ranking="farthest"),
        arm("bpo on 30 prompts", breadth=30, min_depth=1),
        arm("uniform, 30 prompts", "uniform", breadth=30),
        arm("uniform, all prompts", "uniform"),
        arm("one random pair a prompt", "random", max_depth=1),
        "best_worst",
        arm("bpo among best_worst", max_pairs_per_prompt=1),
        "margin",
        "coreset",
        "d_optimal",
    ],
    "usefulness": [
        arm("matching (default)"),
        arm("centrality", usefulness=C),
        arm("alignment", usefulness=A),
        arm("centrality + alignment", usefulness={**C, **A}),
        arm("centrality + score gap", usefulness={**C, **G}),
        arm("alignment + score gap", usefulness={**A, **G}),
        arm("all three", usefulness={**C, **A, **G}),
        arm("centrality + informativeness", usefulness={**C, **N}),
        arm("centrality − informativeness", usefulness={**C, "informativeness": -1.0}),
    ],
    "clusters": [arm(f"k = {k}", n_clusters=k) for k in (1, 5, 20, 50, 100, 200)],
    "rules": [
        arm("nearest, Euclidean, by size (default)"),
        arm("one pair a prompt", max_depth=1),
        arm("softmax of centrality + alignment", ranking="softmax"),
        arm("cosine k-means", metric="cosine"),
        arm("clusters by informativeness", cluster_weighting="informativeness"),
        arm("clusters by centrality", cluster_weighting="centrality"),
        arm("clusters by alignment", cluster_weighting="alignment"),
    ],
    "length": [
        arm(f"{strategy}, {control or 'no length control'}", strategy, length_control=control)
        for strategy in ("bpo", "best_worst", "margin")
        for control in (None, "residual", "balance")
    ],
}
FEW = ["bpo", "best_worst"]
OTHERS = "matching margin easiest bees lossdiff smallest_margin alignment_potential coreset air".split()  # noqa: SIM905


def resketched(store, dim, directory):
    """A copy of a store with shorter sketches: a sketch of a sketch is one of the gradient."""
    opened = bpo.GradientStore.open(store)
    sketches = opened.sketches(np.arange(len(opened)))
    if dim > sketches.shape[1]:
        return None
    fingerprint = json.loads(json.dumps(opened.fingerprint))
    fingerprint["sketch"]["dim"] = dim
    path = directory / f"d{dim}"
    with StoreWriter.create(path, dim, json.dumps(fingerprint), dtype="float32") as writer:
        short = sketches if dim == sketches.shape[1] else Sketcher(dim, seed=1).sketch(np.ascontiguousarray(sketches))
        writer.append(short, np.array(opened.records).view(RECORD).copy())
    return path


def cut(rows, n_responses):
    """The first so many responses of each prompt."""
    return [{**row, "responses": row["responses"][:n_responses], "scores": row["scores"][:n_responses]} for row in rows]


def flipped(rows, share, seed, heldout):
    """Training pairs of which a share is turned round, and clean held-out pairs: lists of preference rows."""
    generator = np.random.default_rng([seed, 3])
    out = set(generator.permutation(len(rows))[: round(heldout * len(rows))].tolist())
    sides = [], []
    for index, row in enumerate(rows):
        for i, better in enumerate(row["scores"]):
            for j, worse in enumerate(row["scores"]):
                if better <= worse:
                    continue
                pair = [(row["responses"][i], better), (row["responses"][j], worse)]
                if index not in out and generator.random() < share:
                    pair.reverse()
                (chosen, high), (rejected, low) = pair
                high, low = max(high, low), min(high, low)
                sides[index in out].append(
                    {
                        "prompt": row["prompt"],
                        "chosen": chosen,
                        "rejected": rejected,
                        "score_chosen": high,
                        "score_rejected": low,
                    }
                )
    return sides


def table(title, columns):
    """Prints a table: one column a preview or budget, one row an arm."""
    print(f"\n**{title}**\n\n| arm | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns))
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(cells.get(name, "–") for cells in columns.values()) + " |")


def cells(found, budget):
    """Accuracy of random and of all, differences of the others."""
    position, result = found.budgets.index(budget), {}
    base = found.arms.index("random")
    for index, name in enumerate(found.arms):
        accuracy = found.accuracy[index, position]
        if name in ("random", ALL):
            result[name] = f"{accuracy.mean():.3f}"
            continue
        if np.isnan(accuracy).any():
            continue
        gain = 100 * (accuracy - found.accuracy[base, position])
        controlled = 100 * (found.length_controlled[index, position] - found.length_controlled[base, position])
        error = gain.std(ddof=1) / len(gain) ** 0.5
        result[name] = f"{gain.mean():+.1f} ± {error:.1f} ({np.nanmean(controlled):+.1f})"
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--dim", type=int, help="length to which the sketches are shortened first")
    parser.add_argument("--only", nargs="+", default=[*GROUPS, "sketch", "responses", "noise", "stores"])
    parser.add_argument("--stores", nargs="+", default=[], metavar="NAME=STORE")
    parser.add_argument("--noisy-data", type=Path, metavar="DIRECTORY")
    parser.add_argument("--figure", type=Path, help="of the main comparison")
    options = parser.parse_args()
    rows = [
        {name: row[name] for name in ("prompt", "responses", "scores")}
        for row in map(json.loads, options.data.read_text(encoding="utf-8").splitlines())
    ]
    if options.noisy_data:
        options.noisy_data.mkdir(parents=True, exist_ok=True)
        for seed in range(4):
            for name, part in zip(("train", "heldout"), flipped(rows, 0.2, seed, 0.25), strict=True):
                text = "".join(json.dumps(row) + "\n" for row in part)
                (options.noisy_data / f"{seed}-{name}.jsonl").write_text(text, encoding="utf-8")
        return
    scratch = Path(tempfile.mkdtemp())
    short = options.store
    if options.dim is not None:
        (scratch / "short").mkdir()
        short = resketched(options.store, options.dim, scratch / "short")

    def preview(store=short, data=rows, arms=FEW, budget=BUDGETS, seeds=options.seeds, **more):
        return bpo.preview(store, data, budget=budget, arms=["random", *arms], seeds=seeds, progress=False, **more)

    for name in options.only:
        if name in GROUPS:
            found = preview(arms=GROUPS[name])
            table(name, {f"{budget} pairs": cells(found, budget) for budget in BUDGETS})
            if name == "main":
                print(
                    f"\n{found.n_pairs:.0f} candidate and {found.n_heldout:.0f} held-out pairs, {found.seconds:.0f} s"
                )
                if options.figure:
                    found.figure(options.figure)
                    found.save(options.figure.with_suffix(".json"))
        elif name == "sketch":
            stores = {dim: resketched(options.store, dim, scratch) for dim in (128, 256, 512, 1024, 2048, 4096)}
            table(name, {f"d = {dim}": cells(preview(path), 60) for dim, path in stores.items() if path})
        elif name == "stores" and options.stores:
            by = dict(option.split("=", 1) for option in options.stores)
            found = preview(arms=["bpo", *({"name": key, "strategy": "bpo", "store": by[key]} for key in by)])
            table(name, {f"{budget} pairs": cells(found, budget) for budget in BUDGETS})
        elif name == "responses":
            most = max(len(row["responses"]) for row in rows)
            counts = [count for count in (2, 3, 4, 8) if count <= most]
            table(name, {f"m = {count}": cells(preview(data=cut(rows, count)), 60) for count in counts})
        elif name == "noise":
            columns = {}
            for share in (0.0, 0.2, 0.4):
                parts = []
                for seed in range(max(1, options.seeds // 5)):
                    train, test = flipped(rows, share, seed, 0.25)
                    parts.append(
                        preview(
                            data=train,
                            heldout=test,
                            seeds=1,
                            budget=[60],
                            arms=[*FEW, *OTHERS, *GROUPS["usefulness"][1:4]],
                        )
                    )
                joined = {
                    field: np.concatenate([getattr(part, field) for part in parts], axis=2)
                    for field in ("accuracy", "length_controlled")
                }
                whole = dataclasses.replace(parts[0], **joined)
                columns[f"{share:.0%} flipped"] = cells(whole, 60)
            table(name, columns)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
