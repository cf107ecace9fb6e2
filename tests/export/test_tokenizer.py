import copy
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from forerun.errors import SourceError, UnsupportedError
from forerun.export.pretokenizers import PRE_TOKENIZERS
from forerun.export.tokenizer import TokenizerSource, write_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = json.loads((GOLDEN / "texts.json").read_text("utf-8"))
BPE = json.loads((GOLDEN / "tiny_bpe.json").read_text("utf-8"))
SPM = json.loads((GOLDEN / "tiny_spm.json").read_text("utf-8"))
PREFIX = {"prefix": True, "plain": False}


def rebuild(meta, folder):
    path = folder / "tokenizer.json"
    write_tokenizer(TokenizerSource(gguf=meta), path)
    return Tokenizer.from_file(str(path))


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {pre: rebuild(BPE["gguf"] | {"pre": pre}, folder) for pre in PRE_TOKENIZERS}
    for kind, prefix in PREFIX.items():
        made[kind] = rebuild(SPM["gguf"] | {"add_space_prefix": prefix}, folder)
    return made


@pytest.mark.parametrize("pre", sorted(BPE["ids"]))
def test_pre_tokenizers_cut_as_llama_cpp_does(tokenizers, pre):
    for name, text in TEXTS.items():
        if PRE_TOKENIZERS[pre].normalizer:
            text = unicodedata.normalize("NFC", text)
        assert ids(tokenizers[pre], text) == BPE["ids"][pre][name], name


def test_every_row_of_the_table_has_golden_ids():
    tested = [PRE_TOKENIZERS[pre] for pre in BPE["ids"]]
    assert all(row in tested for row in PRE_TOKENIZERS.values())


def test_the_golden_texts_tell_the_pre_tokenizers_apart():
    results = [json.dumps(BPE["ids"][pre]) for pre in BPE["ids"]]
    assert len(set(results)) == len(results)


def test_qwen_composes_characters(tokenizers):
    assert ids(tokenizers["qwen2"], "e\u0301") == ids(tokenizers["qwen2"], "\u00e9")


@pytest.mark.parametrize("kind", sorted(PREFIX))
def test_merges_from_scores_give_the_ids_of_llama_cpp(tokenizers, kind):
    for name, text in TEXTS.items():
        assert ids(tokenizers[kind], text) == SPM["ids"][kind][name], name


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60), kind=st.sampled_from(["smollm", "llama-bpe", "gpt-2", "plain"]))
def test_any_text_comes_back(tokenizers, text, kind):
    tokenizer = tokenizers[kind]
    # A plain U+2581 is what SentencePiece writes for a space.
    wanted = text.replace("\u2581", " ") if kind == "plain" else text
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == wanted


def test_special_tokens_are_one_id_and_can_be_skipped(tokenizers):
    found = ids(tokenizers["smollm"], "<|im_start|>hi<|im_end|>")
    assert found[0] == 1 and found[-1] == 2
    assert tokenizers["smollm"].decode(found) == "hi"


def test_user_defined_tokens_are_not_special(tokenizers):
    found = ids(tokenizers["plain"], "a<|user|>b")
    assert SPM["gguf"]["tokens"].index("<|user|>") in found
    assert tokenizers["plain"].decode(found) == "a<|user|>b"


def test_nothing_is_added_to_a_text(tokenizers):
    for name in ("smollm", "plain"):
        assert tokenizers[name].encode("hi").ids == ids(tokenizers[name], "hi")


def test_a_file_is_copied_byte_for_byte(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_tokenizer(TokenizerSource(gguf=BPE["gguf"] | {"pre": "gpt-2"}), first)
    first.write_text(first.read_text("utf-8") + "\n \n", "utf-8")
    write_tokenizer(TokenizerSource(json_path=first), second)
    assert second.read_bytes() == first.read_bytes()


def test_rebuilding_is_deterministic(tmp_path):
    for name in ("a", "b"):
        write_tokenizer(TokenizerSource(gguf=copy.deepcopy(SPM["gguf"])), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_arrays_are_taken_like_lists(tmp_path):
    meta = SPM["gguf"] | {
        "scores": np.array(SPM["gguf"]["scores"], np.float32),
        "token_type": np.array(SPM["gguf"]["token_type"], np.int32),
        "add_space_prefix": False,
    }
    text = TEXTS["mixed_scripts"]
    assert ids(rebuild(meta, tmp_path), text) == SPM["ids"]["plain"]["mixed_scripts"]


def swapped(key, number, value):
    def change(meta):
        meta[key][number] = value

    return change


def replaced(**values):
    return lambda meta: meta.update(values)


def dropped(key):
    return lambda meta: meta.pop(key)


def shortened(key):
    return lambda meta: meta[key].pop()


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (BPE, dropped("tokens"), "tokens is missing"),
        (BPE, replaced(tokens=[]), "0 entries"),
        (BPE, replaced(tokens="abc"), "tokens is missing or is not an array"),
        (BPE, swapped("tokens", 9, 9), r"tokens\[9\] is not of type str"),
        (BPE, swapped("tokens", 9, ""), "token 9 has 0 characters"),
        (BPE, swapped("tokens", 9, "x" * 5000), "token 9 has 5000 characters"),
        (BPE, swapped("tokens", 9, "<|im_end|>"), "'<|im_end|>' twice"),
        (BPE, shortened("token_type"), "token types"),
        (BPE, swapped("token_type", 0, 7), "unknown type 7"),
        (BPE, swapped("token_type", 0, True), "not of type int"),
        (BPE, dropped("merges"), "merges is missing"),
        (BPE, swapped("merges", 3, "abc"), "not two tokens"),
        (BPE, swapped("merges", 3, "a b c"), "not two tokens"),
        (BPE, swapped("merges", 3, " "), "not two tokens"),
        (BPE, swapped("merges", 3, "zzzzq qqqqz"), "not a token"),
        (SPM, dropped("scores"), "scores is missing"),
        (SPM, shortened("scores"), "scores"),
        (SPM, swapped("scores", 3, float("nan")), "NaN"),
        (SPM, swapped("tokens", 10, "no byte"), "255 of the 256"),
    ],
)
def test_malformed_metadata_is_refused(tmp_path, base, change, words):
    meta = copy.deepcopy(base["gguf"]) | {"pre": "gpt-2"}
    change(meta)
    out = tmp_path / "tokenizer.json"
    with pytest.raises(SourceError, match=words):
        write_tokenizer(TokenizerSource(gguf=meta), out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced(pre="falcon"), "pre-tokenizer 'falcon' is not known; known: .*smollm"),
        (replaced(pre=["x"]), "is not known"),
        (replaced(model="rwkv"), "tokenizer model 'rwkv' is not known; known: gpt2, llama"),
        (dropped("model"), "None is not known"),
    ],
)
def test_unknown_kinds_are_named(tmp_path, change, words):
    meta = copy.deepcopy(BPE["gguf"])
    change(meta)
    with pytest.raises(UnsupportedError, match=words):
        write_tokenizer(TokenizerSource(gguf=meta), tmp_path / "out.json")


def test_no_tokenizer_at_all(tmp_path):
    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json"):
        write_tokenizer(TokenizerSource(), tmp_path / "out.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"model":', b"\xff\xfe", None])
def test_damaged_files_are_refused(tmp_path, content):
    path, out = tmp_path / "in.json", tmp_path / "out.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError):
        write_tokenizer(TokenizerSource(json_path=path), out)
    assert not out.exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_cut_file_is_refused(tokenizers, tmp_path_factory, data):
    whole = tokenizers["gpt-2"].to_str().encode()
    folder = tmp_path_factory.mktemp("cut")
    (folder / "in.json").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(SourceError):
        write_tokenizer(TokenizerSource(json_path=folder / "in.json"), folder / "out.json")


@pytest.mark.model
def test_smollm2_has_the_ids_of_llama_cpp():
    from forerun.devices.home import find_bundle
    from forerun.runtime.manifest import load_manifest

    folder = find_bundle("smollm2-135m")
    tokenizer = Tokenizer.from_file(str(folder / load_manifest(folder).tokenizer.file))
    golden = json.loads((GOLDEN / "smollm2.json").read_text("utf-8"))["ids"]
    assert golden.keys() == TEXTS.keys()
    for name, text in TEXTS.items():
        found = ids(tokenizer, text)
        assert found == golden[name], name
        assert tokenizer.decode(found, skip_special_tokens=False) == text


@pytest.mark.model
def test_gemma3_has_the_ids_of_llama_cpp():
    from forerun.devices.home import find_bundle
    from forerun.errors import UnknownModelError
    from forerun.runtime.manifest import load_manifest

    try:
        folder = find_bundle("gemma3-270m")
    except UnknownModelError:
        pytest.skip("gemma3-270m is not pulled; its terms must be accepted first")
    tokenizer = Tokenizer.from_file(str(folder / load_manifest(folder).tokenizer.file))
    golden = json.loads((GOLDEN / "gemma3.json").read_text("utf-8"))["ids"]
    for name, text in TEXTS.items():
        assert ids(tokenizer, text) == golden[name], name
