"""Ladders whose truth is known: losses of the law with noise that arms and durations share."""

from blockwright.lab.statistics.law import Rung

FLOOR, OF_SIZE, OF_DATA, EXPONENT = 1.10, 0.20, 0.40, 0.35  # nats; the terms at 1e6 parameters and at 4e6 tokens
DOUBLED = [1e5 * 2**i for i in range(4)]
QUADRUPLED = [1.25e4 * 4**i for i in range(4)]
RATIOS = (5, 10, 20)  # tokens per parameter
ARMS = ("plain", "changed", "third", "fourth")


def loss(parameters, tokens, of_data=EXPONENT):
    """The true law, in nats."""
    return FLOOR + OF_SIZE * (parameters / 1e6) ** -EXPONENT + OF_DATA * (tokens / 4e6) ** -of_data


def ladder(
    rng,
    gains=((1, 1), (1, 1)),
    noise=0.007,
    sizes=tuple(DOUBLED),
    ratios=RATIOS,
    seeds=3,
    pairing=0.5,
    trunk=0.2,
    exponent=EXPONENT,
    cell=0.0,
    above=0.0,
    tuning=0.0,
):
    """One simulated ladder.

    Args:
        rng: of the noise
        gains: ρ_N and ρ_D of each arm
        noise: sd of a training
        sizes, ratios, seeds: parameters, tokens per parameter, number of seeds
        pairing: share of the variance that the arms of a (size, duration, seed) have in common
        trunk: share of the variance that the durations of a (size, seed, arm) have in common
        exponent: β of the second arm
        cell: sd of what all seeds of an (arm, size, duration) have in common, as of a rate that is not tuned
        above: nats by which the smallest size lies above the law
        tuning: sd of the excess loss that an (arm, size) has of the value it was tuned to, a χ² of one degree
    """
    shared = {}

    def draw(*key):
        return shared.setdefault(key, float(rng.standard_normal()))

    rungs = []
    for i, parameters in enumerate(sizes):
        for j, ratio in enumerate(ratios):
            for seed in range(seeds):
                for k, (of_size, of_data) in enumerate(gains):
                    tokens = parameters * ratio
                    mean = loss(of_size * parameters, of_data * tokens, exponent if k == 1 else EXPONENT)
                    own = (1 - pairing - trunk) ** 0.5 * float(rng.standard_normal())
                    common = pairing**0.5 * draw("pair", i, j, seed) + trunk**0.5 * draw("trunk", i, seed, k)
                    value = mean + noise * (own + common) + cell * draw("cell", i, j, k) + above * (i == 0)
                    if tuning:
                        value += tuning * draw("tuning", i, k) ** 2 / 2**0.5
                    rungs.append(Rung(ARMS[k], str(i), str(j), seed, parameters, tokens, value))
    return rungs
