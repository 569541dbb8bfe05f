"""What is measured on answers, as pure functions of texts, ids and numbers. evaluate.py has the
models: it draws the answers and calls these."""

from itertools import combinations

import numpy as np


# --- errors of a mean, rates, correlation --------------------------------------------------------


def clustered_se(x, clusters):
    """Standard error of the mean of x (n,), whose entries depend on each other within a cluster:
    several prompts ask the same question in other words, and a prompt may be sampled twice.
    nan for a single cluster, which says nothing about others."""
    clusters = np.unique(clusters, return_inverse=True)[1]
    if clusters.max() == 0:
        return float("nan")
    return float((np.bincount(clusters, x - np.mean(x)) ** 2).sum() ** 0.5 / len(x))


def rate_interval(x, se, n):
    """(low, high), 95%, of the mean of x (0 and 1) with standard error se, from n clusters.

    Wilson's interval, of as many independent trials as would have that error. Where all are 0 or
    all 1 the error is 0 and says nothing: there every cluster counts as one trial.
    """
    p, z = float(np.mean(x)), 1.96
    trials = p * (1 - p) / se ** 2 if se > 1e-9 else n  # it may round to nearly 0
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (p * (1 - p) / trials + z * z / (4 * trials ** 2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_rate(x, clusters):
    """(mean of x (n,), low, high): a rate and its 95% interval, whose entries depend on each other
    within a cluster."""
    x = np.asarray(x, float)
    return float(x.mean()), *rate_interval(x, clustered_se(x, clusters), len(set(clusters)))


def rank_correlation(x, y, groups):
    """Spearman's rank correlation of x and y within groups, all (n,): of their ranks among those of
    their group (equal ones share their mean rank), less the group's mean. A large group weighs more
    than a small one. nan where one of the two is the same throughout every group.
    """
    x, y, groups = map(np.asarray, (x, y, groups))
    order = np.argsort(groups, kind="stable")
    cuts = np.flatnonzero(np.diff(groups[order])) + 1
    centred = lambda v: np.sign(v[:, None] - v).sum(1) / 2  # a rank, less the mean rank
    a, b = (np.concatenate([centred(v[part]) for part in np.split(order, cuts)])
            for v in (x.astype(float), y.astype(float)))
    scale = ((a * a).sum() * (b * b).sum()) ** 0.5
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


# --- one answer, or several to one prompt --------------------------------------------------------


def grams(items, n):
    """The runs of n items, as tuples, in their order."""
    return list(zip(*(items[i:] for i in range(n))))


def repetition(ids, n=3):
    """Share of the runs of n tokens of an answer that stand in it before; 0 where it has none."""
    found = grams(ids, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct_answers(texts):
    """How many different ones, of the answers to one prompt; spaces at the ends do not count."""
    return len({text.strip() for text in texts})


def distinct_grams(texts, n=2):
    """Different runs of n words over all of them, in the answers to one prompt (distinct-n of Li et
    al. 2016). 0 where no answer has n words."""
    found = [gram for text in texts for gram in grams(text.lower().split(), n)]
    return len(set(found)) / len(found) if found else 0.0


def overlap(texts):
    """Words that two answers share over the words of both, as sets: the mean over all pairs of the
    answers to one prompt. 1: always the same words. Two empty answers are the same."""
    words = [set(text.lower().split()) for text in texts]
    if len(words) < 2:
        return 1.0
    return float(np.mean([len(a & b) / len(a | b) if a | b else 1.0
                          for a, b in combinations(words, 2)]))


# --- wins ----------------------------------------------------------------------------------------


def logistic(x, y, cluster, ridge=1e-3):
    """P(y) = 1 / (1 + exp(-x w)), fitted by maximum likelihood: (w, its covariance).

    x (n, k); y (n,) in [0, 1], a tie is 0.5; cluster (n,): rows of one cluster depend on each
    other, so the covariance is the sandwich over clusters, nan where there are fewer than k + 1.
    ridge / 2 * |w|^2 is taken off the log likelihood, so that w stays finite where one side always
    wins; there its size is the ridge's.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    w = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (y - p) - ridge * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        w = w + step * min(1.0, 5 / max(np.abs(step).max(), 1e-12))  # a full step may overshoot
        if np.abs(step).max() < 1e-10:
            break
    _, index = np.unique(np.asarray(cluster), return_inverse=True)
    scores = np.zeros((index.max() + 1, len(w)))
    np.add.at(scores, index, x * (y - p)[:, None])
    if len(scores) <= len(w):
        return w, np.full((len(w), len(w)), np.nan)
    bread = np.linalg.inv(hessian)
    return w, bread @ (scores.T @ scores) @ bread


def length_controlled(win, difference, cluster):
    """(win rate at equal length, its standard error), after Dubois et al. 2024.

    win (n,): 1, 0.5 for a tie or 0, of one answer against another; difference (n,): its length less
    that of the other, in tokens. A logistic regression of the win on the difference, in units of
    its standard deviation; the rate is what it says at a difference of 0. Both are nan where all
    differences are the same and not 0; the error where one side always wins.
    """
    win, difference = np.asarray(win, float), np.asarray(difference, float)
    if difference.std() == 0:
        return float(win.mean() if difference[0] == 0 else "nan"), float("nan")
    x = np.stack([np.ones(len(difference)), difference / difference.std()], 1)
    w, covariance = logistic(x, win, cluster)
    rate, always = 1 / (1 + np.exp(-w[0])), len(set(win)) == 1 and win[0] != 0.5
    return float(rate), float("nan" if always else rate * (1 - rate) * covariance[0, 0] ** 0.5)


def rating(values, differ, cluster):
    """Bradley-Terry: strengths s with P(i beats j) = 1 / (1 + exp(s_j - s_i)), from all pairs.

    values (m, n): what each of m models earns on each of n prompts, the higher wins; differ
    (m, m, n): False where two answers are the same, which is a tie. Returns (s, standard errors),
    each (m,), in nats of odds; the first model stands at 0. The error is nan of one that always
    wins or always loses: how far off it stands nobody can know.
    """
    values = np.asarray(values, float)
    m, n = values.shape
    x, y, clusters = [], [], []
    for i, j in combinations(range(m), 2):
        row = np.zeros(m)
        row[i], row[j] = 1, -1
        x.append(np.tile(row[1:], (n, 1)))
        y.append(np.sign(values[i] - values[j]) * differ[i][j] / 2 + 0.5)
        clusters.append(cluster)
    if m < 2:
        return np.zeros(1), np.zeros(1)
    x, y = np.concatenate(x), np.concatenate(y)
    w, covariance = logistic(x, y, np.concatenate(clusters))
    mine = [np.where(column > 0, y, 1 - y)[column != 0] for column in x.T]  # wins of each model
    never = np.array([set(wins) in ({0.0}, {1.0}) for wins in mine])
    return np.r_[0.0, w], np.r_[0.0, np.where(never, np.nan, np.diag(covariance) ** 0.5)]
