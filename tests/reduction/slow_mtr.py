"""MTR written a second time, token by token, from its description; shares nothing with the package."""

import math


def mtr(score, features, hidden, residual, special, remove, target_fraction):
    """One reduction step on one image.

    Args:
        score: L importances. features, hidden, residual: L lists of C numbers. special: protected positions.

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
