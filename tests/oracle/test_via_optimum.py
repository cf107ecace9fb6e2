"""`--via optimum` on a model that has no architecture row."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from forerun.errors import ExportMismatch, OptionError, UnsupportedError
from forerun.export import via_optimum
from forerun.export.sources import open_source
from forerun.export.via_optimum import GIVEN_UP, export_via_optimum

# What the tracer of torch warns of is optimum's business.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=272, n_positions=128, n_embd=32, n_layer=2, n_head=2)
    config.initializer_range = 0.3
    out = tmp_path_factory.mktemp("gpt2")
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    _save_tokenizer(out)
    return out


def _save_tokenizer(out):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(out)


def test_a_model_without_a_row_is_exported_checked_and_described(folder, tmp_path):
    from optimum.onnxruntime import ORTModelForCausalLM

    with pytest.raises(UnsupportedError, match="via optimum"):
        open_source(folder)
    stages = []
    out = tmp_path / "out"
    report = export_via_optimum(folder, out, lambda *stage: stages.append(stage))
    assert report["max_abs_error"] <= report["bound"]
    assert report["model_type"] == "gpt2" and report["given_up"] == list(GIVEN_UP)
    assert {stage for stage, _, _ in stages} == {"export", "check"}
    card = (out / "README.md").read_text("utf-8")
    assert all(sentence in card for sentence in GIVEN_UP)
    assert not (out / "manifest.json").exists()
    ids = AutoTokenizer.from_pretrained(out)("hello", return_tensors="pt").input_ids
    settings = {"max_new_tokens": 12, "do_sample": False}
    model = AutoModelForCausalLM.from_pretrained(folder)
    other = ORTModelForCausalLM.from_pretrained(out)
    assert model.generate(ids, **settings).tolist() == other.generate(ids, **settings).tolist()


def test_a_wrong_graph_is_not_let_out(folder, tmp_path, monkeypatch):
    def other(source, out):
        model = AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():
            model.transformer.h[1].mlp.c_proj.bias[0] += 2
        model.save_pretrained(tmp_path / "wrong")
        export(str(tmp_path / "wrong"), out)

    export = via_optimum._export
    monkeypatch.setattr(via_optimum, "_export", other)
    with pytest.raises(ExportMismatch, match="logits differs"):
        export_via_optimum(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"wrong"}


def test_bad_sources_and_targets(folder, tmp_path):
    with pytest.raises(UnsupportedError):
        export_via_optimum(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedError):
        export_via_optimum(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(OptionError, match="exists"):
        export_via_optimum(folder, tmp_path / "taken")
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_optimum_does_not_know(tmp_path):
    from transformers import CTRLConfig, CTRLLMHeadModel

    config = CTRLConfig(vocab_size=64, n_embd=16, dff=16, n_layer=1, n_head=2, n_positions=64)
    CTRLLMHeadModel(config).save_pretrained(tmp_path / "ctrl")
    with pytest.raises(UnsupportedError, match="optimum cannot export"):
        export_via_optimum(tmp_path / "ctrl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
