"""Speed-ups that drafting can give, as functions of what was measured.

Times are in units of one plain step T(1) of the target. Letters, as in the literature
(Leviathan 2023, PEARL, DuoDecoding): `alpha` is the chance that a drafted token is right given
that all before it were; `gamma` the drafted tokens of a round; `c` the time of one draft step;
`r` the time of the step that verifies; `s` the fixed overhead of a round. Acceptance is taken as
independent from token to token.
"""

from __future__ import annotations

from collections.abc import Sequence


def chain_tokens(alpha: float, gamma: int) -> float:
    """Expected tokens of a round that verifies a chain of `gamma`: (1-a^(g+1))/(1-a)."""
    return sum(alpha**i for i in range(gamma + 1))


def serial_chain(alpha: float, gamma: int, c: float, r: float = 1.0, s: float = 0.0) -> float:
    """Speed-up of drafting and verifying in turn."""
    return chain_tokens(alpha, gamma) / (gamma * c + r + s)


def pearl(alpha: float, gamma: int, c: float, r: float = 1.0, s: float = 0.0) -> float:
    """Speed-up of drafting one block while the block before it is verified (PEARL)."""
    return duo(alpha, alpha, gamma, gamma * c, r, s)


def duo(
    alpha: float, first: float, length: int, draft: float, r: float = 1.0, s: float = 0.0
) -> float:
    """Speed-up of PEARL with several first tokens (DuoDecoding).

    Args:
        alpha: acceptance of a token behind a right one.
        first: chance that one of the first tokens is right; `alpha` if there is one only.
        length: tokens of each block.
        draft: time to draft all blocks of a round.
        r: time of a verifying step.
        s: overhead of a round.
    """
    whole = alpha ** (length - 1) * first
    post = first / (first + 1 - whole)
    tokens = (1 - post) + post * chain_tokens(alpha, length - 1)
    return tokens / (max(draft, r) + s)


def optimistic(alpha: float, gamma: int, c: float, r: float = 1.0, s: float = 0.0) -> float:
    """Speed-up of serial drafting that goes on during each verification.

    Only when the whole chain and the token after it were right is the next chain there already.
    """
    redraft = (1 - alpha ** (gamma + 1)) * gamma * c
    return chain_tokens(alpha, gamma) / (max((gamma + 1) * c, r) + redraft + s)


def serial_tree(
    values: Sequence[float], levels: int, c: float, r: float = 1.0, s: float = 0.0
) -> float:
    """Speed-up of drafting a tree level by level and verifying it.

    Args:
        values: chance of each node that it and all before it are right.
        levels: draft steps.
        c: time of one of them.
        r: time of a verifying step of all nodes and the anchor.
        s: overhead of a round.
    """
    return (1 + sum(values)) / (levels * c + r + s)


def one_call(alpha: float, gamma: int, c: float, r: float = 1.0, s: float = 0.0) -> float:
    """Speed-up where a single call drafts all tokens: heads, parallel drafters, n-grams (c = 0)."""
    return chain_tokens(alpha, gamma) / (c + r + s)


def with_misses(
    hits: float, alpha: float, gamma: int, r: float, c: float = 0.0, s: float = 0.0
) -> float:
    """Speed-up of a drafter that has something to say in a share of the rounds only.

    Args:
        hits: that share; the other rounds are plain steps.
        alpha: acceptance.
        gamma: drafted tokens of a round.
        r: time of a verifying step.
        c: time of a draft step.
        s: overhead of a round.
    """
    tokens = (1 - hits) + hits * chain_tokens(alpha, gamma)
    return tokens / ((1 - hits) + hits * (gamma * c + r) + s)


def early_exit(alpha: float, gamma: int, c_exit: float, r_rest: float, s: float = 0.0) -> float:
    """Speed-up where the target's own first layers draft.

    Args:
        alpha: acceptance.
        gamma: drafted tokens of a round.
        c_exit: time of the first layers and the draft head for one token.
        r_rest: time of the other layers for all rows.
        s: overhead of a round.
    """
    return chain_tokens(alpha, gamma) / (gamma * c_exit + r_rest + c_exit + s)


def shared_memory(r: float, kappa: float) -> float:
    """Time of a step while another model reads the same memory.

    Args:
        r: time of the step alone.
        kappa: share by which it gets slower, measured with both sides running; 0 if they do not
            share memory.
    """
    return r * (1 + kappa)
