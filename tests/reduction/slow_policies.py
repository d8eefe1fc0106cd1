"""MTR written a second time, token by token, from its description; shares nothing with the package."""

import math


def mtr(score, features, hidden, residual, special, remove, target_fraction):
    """One reduction step on one image.

    Args:
        score: L importances. features, hidden, residual: L lists of C numbers. special: positions of special tokens.

    Returns:
        reduced hidden and residual, the survivors' positions in order, and for each token the survivor's rank.
    """
    length = len(score)
    ordinary = sorted((i for i in range(length) if i not in special), key=lambda i: (score[i], i))
    sources = ordinary[:remove]
    others = ordinary[remove:]
    targets = others[: max(1, round(target_fraction * len(others)))]

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))

    groups = {i: [i] for i in range(length) if i not in sources}
    for source in sources:
        best = max(targets, key=lambda target: cosine(features[source], features[target]))
        groups[best].append(source)

    survivors = sorted(groups)
    goes_to = [None] * length
    for rank, survivor in enumerate(survivors):
        for token in groups[survivor]:
            goes_to[token] = rank

    def reduced(stream):
        return [
            [sum(stream[t][c] for t in groups[s]) / len(groups[s]) for c in range(len(stream[0]))] for s in survivors
        ]

    return reduced(hidden), reduced(residual), survivors, goes_to


def policy(name, score, features, sizes, special, remove):
    """The baselines on one image, token by token, from their public descriptions.

    Args:
        score: L importances (unused where the policy has none). features: L lists of numbers. sizes: L numbers.

    Returns:
        the survivors' positions in output order, and for the hidden and for the residual stream what each output is
        made of: a list of {position: weight}.
    """
    length = len(score)
    ordinary = [i for i in range(length) if i not in special]
    ranked = sorted(ordinary, key=lambda i: (score[i], i))

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(features[a], features[b], strict=True))
        return dot / (math.hypot(*features[a]) * math.hypot(*features[b]))

    def pair(sources, targets, count):
        """The ``count`` sources most like a target, with that target, the most similar first."""
        best = {s: max(targets, key=lambda t: cosine(s, t)) for s in sources}
        return [(s, best[s]) for s in sorted(sources, key=lambda s: -cosine(s, best[s]))[:count]]

    def distance(i):  # in the sequence, to the nearest special token
        return min(abs(i - s) for s in special)

    pruned, pairs, half = [], [], remove // 2
    if name in ("hsa", "random"):
        pruned = ranked[:remove]
    elif name == "evit":
        pairs = [(s, ranked[remove]) for s in ranked[:remove]]
    elif name in ("tome", "rmeeto", "famba"):
        pairs = pair(ordinary[::2], ordinary[1::2], remove)
    elif name == "adjacent":
        free = sorted(sorted(ordinary, key=lambda i: (distance(i), i))[4 * len(special) :])
        priced = []
        for turn, s in enumerate(free[::2]):
            sides = [t for t in (s + 1, s - 1) if t in free[1::2]]
            if sides:
                t = max(sides, key=lambda t: cosine(s, t))  # of equals, the right one
                priced.append((cosine(s, t), s, t))
            else:  # the zone of a class token is on both sides: goes last, into the next target
                priced.append((-math.inf, s, free[1::2][min(turn, len(free) // 2 - 1)]))
        pairs = [(s, t) for _, s, t in sorted(priced, key=lambda pair: -pair[0])[:remove]]
    elif name == "pumer":
        pruned = ranked[: round(0.5 * remove)]
        rest = [i for i in ordinary if i not in pruned]
        pairs = pair(rest[::2], rest[1::2], remove - len(pruned))
    elif name == "utr":
        middle = len(ordinary) // 2
        pairs = pair(ranked[:middle], ranked[middle:], remove)
        half = round(0.5 * remove)

    removed = set(pruned) | {s for s, _ in pairs}
    survivors = [i for i in range(length) if i not in removed]
    if name == "evit":
        survivors = [i for i in survivors if i in special] + sorted(
            (i for i in survivors if i not in special), key=lambda i: -score[i]
        )
    if name in ("tome", "famba", "pumer"):
        kept = [i for i in ordinary if i not in pruned]
        survivors.sort(key=lambda i: (i in kept[1::2], i))

    def mix(links):
        groups = {s: [s] for s in survivors}
        for source, target in links:
            groups[target].append(source)
        mass = {"evit": lambda i: math.exp(score[i]), "utr": lambda i: 1.0}.get(name, lambda i: sizes[i])
        return [{i: mass(i) / sum(map(mass, groups[s])) for i in groups[s]} for s in survivors]

    residual = mix(pairs)
    return survivors, mix(pairs[half:]) if name == "utr" else residual, residual
