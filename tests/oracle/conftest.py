"""What the oracle tests share: tiny random models, and greedy decoding on both sides.

They need torch, transformers and optimum, so they have an environment of their own
(`requirements.txt`); elsewhere this folder is not collected.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

NEEDED = ("torch", "transformers", "optimum")
TIE = 1e-4
MAX_TIES = 3

collect_ignore_glob = [] if all(map(importlib.util.find_spec, NEEDED)) else ["test_*.py"]


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.path).parents:
            item.add_marker(pytest.mark.oracle)


@dataclass(frozen=True)
class Greedy:
    """Greedy tokens of one prompt, and how far the best logit led at each of them."""

    tokens: list[int]
    leads: list[float]


class Oracle:
    """Helpers that tests get through the fixture `oracle`."""

    def __init__(self, capsys):
        self._capsys = capsys

    def say(self, text):
        """Print past pytest's capture: counts of ties belong in the log."""
        with self._capsys.disabled():
            print(text, flush=True)

    @staticmethod
    def greedy_torch(model, prompts, count):
        """Decode a batch of prompts greedily with transformers, with its KV cache."""
        import torch

        width = max(map(len, prompts))
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        tokens, leads, cache = [], [], None
        with torch.inference_mode():
            for _ in range(count):
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                out = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = out.past_key_values
                best = out.logits[:, -1].float().topk(2)
                ids = best.indices[:, :1]
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
                tokens.append(ids[:, 0].tolist())
                leads.append((best.values[:, 0] - best.values[:, 1]).tolist())
        columns = zip(zip(*tokens, strict=True), zip(*leads, strict=True), strict=True)
        return [Greedy(list(t), list(g)) for t, g in columns]

    @staticmethod
    def greedy_runner(runner, prompt, count):
        """Decode greedily with forerun's graph, one step per token."""
        runner.arena.rewind(0)
        tokens, ids = [], np.asarray(prompt)
        for _ in range(count):
            logits = runner.step(ids).reshape(-1, runner.manifest.model.vocab)
            tokens.append(int(logits[-1].argmax()))
            ids = np.array(tokens[-1:])
        return tokens

    @staticmethod
    def first_difference(reference, tokens):
        """Return None, or (step, lead) where the tokens first differ."""
        for step, (ours, theirs) in enumerate(zip(tokens, reference.tokens, strict=True)):
            if ours != theirs:
                return step, reference.leads[step]
        return None

    def same_tokens(self, references, answers, label, max_ties=MAX_TIES):
        """Demand equal tokens; a first difference is allowed only at a tie, and counted."""
        ties = 0
        for number, (reference, tokens) in enumerate(zip(references, answers, strict=True)):
            difference = self.first_difference(reference, tokens)
            if difference is None:
                continue
            step, lead = difference
            assert lead <= TIE, (
                f"{label}: prompt {number}, token {step}: {tokens[step]} in place of "
                f"{reference.tokens[step]}, which led by {lead:.3g}"
            )
            ties += 1
        total = sum(len(answer) for answer in answers)
        self.say(
            f"\n{label}: {len(answers)} prompts, {total} tokens, {ties} ended at a tie (<= {TIE:g})"
        )
        assert ties <= max_ties, f"{label}: {ties} ties are too many to be chance"


@pytest.fixture
def oracle(capsys):
    return Oracle(capsys)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    # Matrices this small lose more to waiting threads than they gain.
    torch.set_num_threads(1)


def _configs():
    """Name to (transformers config class, settings): every architecture row, all its options."""
    import transformers as t

    common = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "rms_norm_eps": 0.01,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    window = {"use_sliding_window": True, "sliding_window": 12}
    return {
        "llama": (t.LlamaConfig, common),
        "llama-tied-biased-mha": (
            t.LlamaConfig,
            common
            | {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4},
        ),
        "llama-rope-llama3": (
            t.LlamaConfig,
            common | {"rope_scaling": llama3, "rope_theta": 500000.0, "num_key_value_heads": 1},
        ),
        "llama-rope-linear": (
            t.LlamaConfig,
            common | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        "mistral": (t.MistralConfig, common | {"sliding_window": 12}),
        "mistral-no-window": (t.MistralConfig, common | {"sliding_window": None, "head_dim": 32}),
        "qwen2": (t.Qwen2Config, common | {"tie_word_embeddings": True}),
        "qwen2-window": (t.Qwen2Config, common | window | {"max_window_layers": 1}),
        # optimum's runtime takes hidden / heads for the head size of qwen3, so this one has it.
        "qwen3": (t.Qwen3Config, common | {"head_dim": 16}),
        "qwen3-tied-window": (
            t.Qwen3Config,
            common | window | {"head_dim": 32, "tie_word_embeddings": True, "max_window_layers": 2},
        ),
        "gemma3": (
            t.Gemma3TextConfig,
            common
            | {
                "num_hidden_layers": 6,
                "num_key_value_heads": 1,
                "head_dim": 32,
                "sliding_window": 12,
                "query_pre_attn_scalar": 20,
                "tie_word_embeddings": True,
            },
        ),
        "gemma3-own-pattern": (
            t.Gemma3TextConfig,
            common
            | {
                "head_dim": 16,
                "sliding_window": 9,
                "tie_word_embeddings": True,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
        ),
    }


def _save_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<bos>", "<eos>"]
    letters = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.save_pretrained(folder)


def make_tiny(name, folder):
    """Save a random model; norms and biases are random too, or they would test nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    kind, settings = _configs()[name]
    torch.manual_seed(20261)
    model = AutoModelForCausalLM.from_config(kind(**settings), attn_implementation="eager")
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "norm" in key or key.endswith(".bias"):
                value.add_(0.3 * torch.randn_like(value))
    model = model.float().eval()
    model.save_pretrained(folder, safe_serialization=True)
    _save_tokenizer(folder)
    return model


@dataclass(frozen=True)
class Tiny:
    """One tiny model: its folder, the transformers model, and the bundle's folder."""

    name: str
    folder: Path
    model: object
    bundle: Path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return a function: name of a configuration to `Tiny`, exported once."""
    made = {}

    def make(name):
        if name not in made:
            from forerun.export.export import export_model
            from forerun.export.sources import open_source

            root = tmp_path_factory.mktemp(name)
            model = make_tiny(name, root / "hf")
            export_model(open_source(root / "hf"), root / "bundle", name=name, capacity=128)
            made[name] = Tiny(name, root / "hf", model, root / "bundle")
        return made[name]

    return make


def pytest_generate_tests(metafunc):
    if "tiny_name" in metafunc.fixturenames:
        metafunc.parametrize("tiny_name", sorted(_configs()))
    if "row_name" in metafunc.fixturenames:
        metafunc.parametrize("row_name", sorted(n for n in _configs() if "-" not in n))


@pytest.fixture(scope="session")
def model_types():
    """Which `model_type` the tiny models cover."""
    return {kind.model_type for kind, _ in _configs().values()}
