"""A trained head: a small network that drafts from the target's own hidden states.

The target's states of the row before the anchor say what it was about to do (Li et al. 2024,
EAGLE); the token that was drawn since takes the guesswork out. From then on the head goes on with
its own state. It knows only frequent tokens, so that its output layer stays small (Zhao et al.
2025, FR-Spec).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.devices.session import SessionOptions, open_session
from forerun.errors import BundleError
from forerun.runtime.drafting.coupled import CoupledPick
from forerun.runtime.drafting.folder import check_files, check_target, load_info, read_vocab
from forerun.runtime.drafting.tree import TokenTree
from forerun.runtime.manifest import inside

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from forerun.runtime.drafting.drafter import Outcome
    from forerun.runtime.drafting.folder import DrafterInfo
    from forerun.runtime.drafting.registry import DrafterContext
    from forerun.runtime.drafting.vocab import VocabMap
    from forerun.runtime.manifest import Lowering, TensorSpec
    from forerun.runtime.types import SamplingParams

_GRAPH = "step"
_INPUTS = ("features", "state", "ids")
_OUTPUTS = ("logits", "state")


class HeadDrafter:
    """Drafts chains from the target's features, one call of a small graph per token.

    Args:
        network: the head's session.
        vocab: which ids of the target its ids are.
        name: of the drafter in statistics.
    """

    needs_features = True
    proposes_trees = False

    def __init__(self, network: HeadNetwork, vocab: VocabMap, name: str = "head") -> None:
        self.name = name
        self._network = network
        self._vocab = vocab
        self._pick = CoupledPick(vocab)
        self._ids: list[int] = []
        self._answer_start = 0
        self._is_ready = False

    def configure(self, params: SamplingParams, skipped: int = 0) -> None:
        """Rank as the target draws; see `combine.configure`."""
        self._pick.configure(params, skipped)

    def begin(self, ids: Sequence[int], features: np.ndarray | None) -> None:
        """Take up a text; without features the first round is a plain one."""
        self._ids = list(ids)
        self._answer_start = max(len(ids) - 1, 0)
        self._take(features, -1)

    def propose(self, budget: int, keep_going: Callable[[float], bool] | None = None) -> TokenTree:
        """Draft a chain of at most `budget` tokens."""
        if budget < 1 or not self._is_ready:
            return TokenTree.EMPTY
        network, pick = self._network, self._pick
        tokens: list[int] = []
        confidences: list[float] = []
        value = 1.0
        before, last = self._vocab.to_draft(self._ids[-2:])
        history = self._vocab.to_draft(self._ids) if pick.uses_history else []
        network.begin()
        while True:
            logits = network.step(before, last)
            position = len(self._ids) + len(tokens)
            new, sure = pick.choose(logits, position, 1, history, self._answer_start)
            tokens += new
            confidences += sure
            value *= sure[0]
            if len(tokens) >= budget or (keep_going is not None and not keep_going(value)):
                return TokenTree.chain(tokens, confidences, self.name)
            before, last = last, self._vocab.to_draft(new)[0]
            if history:
                history.append(last)

    def observe(self, outcome: Outcome) -> None:
        """Append what was decided, and keep the features of the last row that was right."""
        self._ids += outcome.new_tokens
        self._take(outcome.features, outcome.path[-1] + 1 if outcome.path else 0)

    def rewind(self, length: int) -> None:
        """Forget the tokens from `length` on; the next round is then a plain one."""
        if length < len(self._ids):
            del self._ids[length:]
            self._is_ready = False

    def close(self) -> None:
        """Free the sessions."""
        self._network.close()

    def _take(self, features: np.ndarray | None, row: int) -> None:
        """Keep one row of the features, the one before the anchor."""
        self._is_ready = False
        if features is None or not len(features) or len(self._ids) < 2:
            return
        self._network.features[0] = features[row]
        self._is_ready = True


class HeadNetwork:
    """The session of a head, bound once to arrays that stay.

    The first step reads the features and no state, every later one the state of the step before
    and no features.

    Args:
        info: of the drafter.
        folder: of the drafter.
        options: of the session.

    Raises:
        BundleError: the graph is missing, cannot be loaded, or has other inputs and outputs.

    Attributes:
        features: float32 [1, F], to be filled in before `begin`.
    """

    def __init__(self, info: DrafterInfo, folder: Path, options: SessionOptions) -> None:
        if _GRAPH not in info.graphs:
            raise BundleError(f"{folder}: the head has no graph {_GRAPH!r}; train it again")
        form = info.graphs[_GRAPH]
        self._session: Any = open_session(inside(folder, form.graph), options)
        _check_roles(self._session, form, folder)
        width = info.target.hidden
        self.features = np.zeros((1, width * len(info.target.taps)), np.float32)
        self._ids = np.zeros((1, 2), np.int64)
        size = info.vocab.size if info.vocab else info.target.vocab
        self._logits = np.zeros((1, size), np.float32)
        nothing = np.zeros_like(self.features), np.zeros((1, width), np.float32)
        states = [np.zeros((1, width), np.float32) for _ in range(2)]
        # Bindings keep addresses only.
        self._kept = (*nothing, *states)
        ways = [
            (self.features, nothing[1], states[0]),
            (nothing[0], states[0], states[1]),
            (nothing[0], states[1], states[0]),
        ]
        self._bindings: list[Any] = [self._bind(form, *way) for way in ways]
        self._way = 0

    def begin(self) -> None:
        """Let the next step read `features`."""
        self._way = 0

    def step(self, before: int, last: int) -> np.ndarray:
        """Read a token.

        Args:
            before: the token before it, as the drafter's id.
            last: the token.

        Returns:
            float32 [N] logits of the next one, a view that is valid until the next step.
        """
        self._ids[0] = before, last
        self._session.run_with_iobinding(self._bindings[self._way])
        self._way = 1 if self._way != 1 else 2
        return self._logits[0]

    def close(self) -> None:
        """Free the session."""
        self._bindings.clear()
        self._session = None

    def _bind(
        self, form: Lowering, features: np.ndarray, state: np.ndarray, new_state: np.ndarray
    ) -> Any:
        binding = self._session.io_binding()
        inputs = {"features": features, "state": state, "ids": self._ids}
        outputs = {"logits": self._logits, "state": new_state}
        for specs, arrays, bind in (
            (form.inputs, inputs, binding.bind_input),
            (form.outputs, outputs, binding.bind_output),
        ):
            for role, array in arrays.items():
                _check_spec(specs[role], array, role)
                bind(specs[role].name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding


def open_head(folder: Path, context: DrafterContext) -> HeadDrafter:
    """Open the head in a folder for a target; it always runs on the CPU.

    Raises:
        BundleError: the folder is damaged.
        UnsupportedError: it was made for another target; names the difference.
    """
    info = load_info(folder)
    check_target(info, context.target_manifest)
    check_files(info, folder)
    vocab = read_vocab(info, folder)
    # One thread: waking a second takes longer than its half of so short a step saves.
    options = SessionOptions(threads=1, spin=context.spin)
    return HeadDrafter(HeadNetwork(info, folder, options), vocab)


def _check_roles(session: Any, form: Lowering, folder: Path) -> None:
    """Refuse a graph without the inputs and outputs that its roles name."""
    for roles, specs, here in (
        (_INPUTS, form.inputs, session.get_inputs()),
        (_OUTPUTS, form.outputs, session.get_outputs()),
    ):
        names = {tensor.name for tensor in here}
        for role in roles:
            if role not in specs or specs[role].name not in names:
                raise BundleError(f"{folder}: the head's graph has no {role!r}; train it again")


def _check_spec(spec: TensorSpec, array: np.ndarray, role: str) -> None:
    """Refuse a tensor of another width or dtype than the drafter's sizes make it."""
    if tuple(spec.shape[1:]) != array.shape[1:] or spec.dtype != array.dtype.name:
        raise BundleError(
            f"the head's {role} is {spec.dtype} {list(spec.shape)}, the drafter's sizes make it "
            f"{array.dtype.name} [R, {array.shape[1]}]; train it again"
        )
