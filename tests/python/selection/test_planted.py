"""Strategies where the truth is known: planted usefulness, label noise and copies.

`python tests/python/selection/test_planted.py` prints the table of docs/results.md.
"""

import numpy as np
import pytest

from bpo import SelectConfig
from bpo.pairs.clustering import cluster_pairs
from bpo.pairs.direction import prompts_agree
from bpo.pairs.linear import cross_fitted_margins, fit_direction
from bpo.pairs.pair_gradients import PairGradients, unit_features
from bpo.selection.strategies.candidacy import Candidacy
from bpo.selection.strategies.register import STRATEGIES, run_strategy

DIM, TOPICS, PROMPTS, PAIRS_OF_A_PROMPT, BUDGET = 256, 12, 360, 6, 120
WORLDS = {
    "four topics of twelve are noise": {"noise_topics": 4},
    "a quarter of the labels is flipped": {"flipped": 0.25},
    "a fifth are copies of twenty": {"copies": 0.2},
    "no topic has anything to teach": {"noise_topics": 12},
}
ARMS = {
    "random": ("random", {}),
    "bpo": ("bpo", {}),
    "bpo, centrality + alignment": ("bpo", {"usefulness": {"centrality": 1, "alignment": 1}}),
    "bpo, centrality alone": ("bpo", {"usefulness": {"centrality": 1}}),
    "bpo, alignment alone": ("bpo", {"usefulness": {"alignment": 1}}),
    "bpo, clusters by alignment": ("bpo", {"cluster_weighting": "alignment"}),
    "bpo, 12 clusters": ("bpo", {"n_clusters": 12}),
    "bpo, farthest": ("bpo", {"ranking": "farthest"}),
    "matching": ("matching", {}),
    "coreset": ("coreset", {}),
    "d_optimal": ("d_optimal", {}),
    "bald": ("bald", {}),
    "epig": ("epig", {}),
    "easiest": ("easiest", {}),
    "lossdiff": ("lossdiff", {}),
    "smallest_margin": ("smallest_margin", {}),
    "largest_norm": ("largest_norm", {}),
    "smallest_norm": ("smallest_norm", {}),
    "best_worst": ("best_worst", {}),
    "two_sigma": ("two_sigma", {}),
    "margin": ("margin", {}),
    "bees": ("bees", {}),
    "air": ("air", {}),
    "alignment_potential": ("alignment_potential", {}),
}


class World:
    """Pairs whose gradients are those of their topic and of one direction common to all, under five times the noise.

    Scores know a little of it: the gap of a pair is exponential, with mean 1 where the label is right and half of that
    where it was flipped, and each prompt has a level of its own. The policy knows nothing: its log-probabilities are
    noise, and it is its own reference.
    """

    def __init__(self, seed, noise_topics=0, flipped=0.0, copies=0.0):
        generator = np.random.default_rng(seed)
        topics = generator.normal(size=(TOPICS, DIM))
        topics /= np.linalg.norm(topics, axis=1, keepdims=True)
        common = generator.normal(size=DIM)
        directions = topics + 0.5 * common / np.linalg.norm(common)
        directions[:noise_topics] = 0
        self.prompts = np.repeat(np.arange(PROMPTS), PAIRS_OF_A_PROMPT)
        topic = generator.integers(TOPICS, size=PROMPTS)[self.prompts]
        self.pairs = self._draw(generator, directions[topic])
        self.is_noise = topic < noise_topics
        self.is_flipped = generator.random(len(topic)) < flipped
        self.pairs[self.is_flipped] *= -1
        self.is_copy = np.zeros(len(topic), dtype=bool)
        if copies:
            count = int(copies * len(topic))
            originals, places = generator.choice(len(topic), 20), generator.choice(len(topic), count, replace=False)
            self.pairs[places] = self.pairs[np.resize(originals, count)] * (
                1 + 1e-3 * generator.normal(size=(count, 1))
            )
            self.is_copy[places] = True
        useful = generator.integers(noise_topics, TOPICS, size=2000) if noise_topics < TOPICS else np.zeros(2000, int)
        self.unseen = self._draw(generator, directions[useful])
        self.gaps = generator.exponential(np.where(self.is_flipped, 0.5, 1))
        level = generator.normal(size=PROMPTS)[self.prompts]
        self.scores = np.stack([level + self.gaps / 2, level - self.gaps / 2], axis=1)
        self.logps = generator.normal(-50, 10, size=self.scores.shape)

    @staticmethod
    def _draw(generator, directions):
        return directions + 5 * generator.normal(size=directions.shape) / np.sqrt(DIM)


def measure(world, seed=0, arms=ARMS):
    """Accuracy on unseen pairs, and the shares of noise, flipped labels and copies among what each arm chose."""
    x = world.pairs.astype(np.float32)
    index = np.arange(len(x))
    coefficients = np.tile(np.array([-1, 0], dtype=np.float32), (len(x), 1))
    gradients = PairGradients(x, np.stack([index, index], axis=1), coefficients)
    clustered, found, heldout = {}, {}, None
    for name, (strategy, changes) in arms.items():
        config = SelectConfig(min_depth=0, **changes)
        if config.n_clusters not in clustered:
            clusters = cluster_pairs(*gradients, config=config, seed=seed)
            features = unit_features(gradients, clusters.informativeness, clusters.usable)
            clustered[config.n_clusters] = clusters, features
        clusters, features = clustered[config.n_clusters]
        if "heldout" in STRATEGIES[strategy].needs and heldout is None:
            heldout = cross_fitted_margins(features, world.prompts, seed)
        candidacy = Candidacy(
            prompt_of_pair=world.prompts,
            score_gaps=world.gaps,
            pair_scores=world.scores,
            lengths=np.full(world.scores.shape, 50),
            scores=world.scores.ravel(),
            prompt_of_response=np.repeat(world.prompts, 2),
            eligible=np.ones(len(x), dtype=bool),
            budget=BUDGET,
            config=config,
            seed=seed,
            clusters=clusters,
            features=features,
            heldout_margins=heldout,
            differences=gradients,
            logps=world.logps,
            margins=np.zeros(len(x)),
        )
        chosen = run_strategy(strategy, candidacy)[0]
        assert chosen.sum() == BUDGET
        weights = fit_direction(x[chosen] / np.linalg.norm(x[chosen], axis=1, keepdims=True), 1.0)
        found[name] = {
            "accuracy": (world.unseen @ weights > 0).mean(),
            "noise": world.is_noise[chosen].mean(),
            "flipped": world.is_flipped[chosen].mean(),
            "copies": world.is_copy[chosen].mean(),
        }
    return found


def averages(settings, arms=ARMS, seeds=4):
    """The mean of each figure over several worlds."""
    found = [measure(World(seed, **settings), seed, arms) for seed in range(seeds)]
    return {arm: {key: np.mean([each[arm][key] for each in found]) for key in found[0][arm]} for arm in arms}


@pytest.fixture(scope="module")
def planted():
    arms = {
        name: ARMS[name]
        for name in (
            "random",
            "bpo",
            "matching",
            "bpo, centrality + alignment",
            "bpo, centrality alone",
            "bpo, farthest",
            "d_optimal",
        )
    }
    return {name: averages(settings, arms) for name, settings in WORLDS.items()}


def test_depth_goes_where_the_usefulness_is_planted(planted):
    found = planted["four topics of twelve are noise"]
    assert found["random"]["noise"] > 0.28
    terms = found["bpo, centrality + alignment"]
    assert terms["noise"] < 0.1 < found["bpo"]["noise"] < 0.2 < 0.6 < found["bpo, farthest"]["noise"]
    assert terms["accuracy"] > found["random"]["accuracy"] + 0.04
    # What noise lies across the direction is there to cancel what other pairs have of it.
    assert min(found["bpo"]["accuracy"], found["matching"]["accuracy"]) > terms["accuracy"] + 0.005


def test_flipped_labels_are_left_out(planted):
    found = planted["a quarter of the labels is flipped"]
    assert found["random"]["flipped"] > 0.2
    terms, central = found["bpo, centrality + alignment"], found["bpo, centrality alone"]
    assert max(found["bpo"]["flipped"], terms["flipped"]) < 0.14 < central["flipped"]
    assert found["bpo"]["accuracy"] > terms["accuracy"] + 0.02
    assert terms["accuracy"] > central["accuracy"] + 0.02
    assert central["accuracy"] > found["random"]["accuracy"] + 0.04
    assert found["matching"]["flipped"] < 0.1
    assert found["matching"]["accuracy"] > found["bpo"]["accuracy"] + 0.005


def test_heldout_margins_tell_flipped_labels_from_others():
    """Pairs with such labels have the smallest margins, so the hardest collect them first."""
    names = ("random", "easiest", "lossdiff", "smallest_margin", "bees", "margin")
    found = averages(WORLDS["a quarter of the labels is flipped"], {name: ARMS[name] for name in names}, seeds=1)
    assert max(found["easiest"]["flipped"], found["lossdiff"]["flipped"]) < 0.02
    assert found["smallest_margin"]["flipped"] > 0.9
    assert found["bees"]["flipped"] < found["margin"]["flipped"] < found["random"]["flipped"]
    assert (
        found["smallest_margin"]["accuracy"] < 0.2 and found["easiest"]["accuracy"] > found["random"]["accuracy"] + 0.1
    )


def test_copies_get_no_more_than_their_share(planted):
    found = planted["a fifth are copies of twenty"]
    assert found["random"]["copies"] > 0.15
    assert found["bpo"]["copies"] < 0.25
    assert found["d_optimal"]["copies"] < 0.05 and found["matching"]["copies"] < 0.1
    assert found["bpo"]["accuracy"] > found["bpo, centrality + alignment"]["accuracy"] + 0.002
    assert found["matching"]["accuracy"] > found["bpo"]["accuracy"] + 0.005


def test_where_there_is_nothing_to_learn_nothing_is_claimed(planted):
    found = planted["no topic has anything to teach"]
    assert all(abs(figures["accuracy"] - 0.5) < 0.06 for figures in found.values())


@pytest.mark.parametrize("title", WORLDS)
def test_a_common_direction_is_found_where_there_is_one(title):
    """What ``select`` says in ``Selection.noted`` when it cannot help."""
    found = []
    for seed in range(10):
        world = World(seed, **WORLDS[title])
        x = world.pairs / np.linalg.norm(world.pairs, axis=1, keepdims=True)
        index = np.arange(len(x))
        coefficients = np.tile(np.array([-1, 0], dtype=np.float32), (len(x), 1))
        features = PairGradients(x.astype(np.float32), np.stack([index, index], axis=1), coefficients)
        found.append(prompts_agree(features, np.ones(len(x), dtype=bool), world.prompts, seed))
    if WORLDS[title].get("noise_topics") == TOPICS:
        assert np.median(found) > 0.1 and sum(p < 0.05 for p in found) <= 3
    else:
        assert max(found) < 0.01


if __name__ == "__main__":
    for title, settings in WORLDS.items():
        print(f"\n{title}\n{'':28} accuracy  noise  flipped  copies")
        for name, figures in averages(settings, seeds=20).items():
            columns = zip(figures.values(), ("8.3f", "6.2f", "8.2f", "7.2f"), strict=True)
            print(f"{name:28}", *(format(value, kind) for value, kind in columns))
